"""Reports: the main numbers are recomputed, and every kind of work directory gets a report."""

import dataclasses
import itertools
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from hjepa_jax.evaluation.intervals import difference, wilson
from hjepa_jax.evaluation.quality import collapse_verdict
from hjepa_jax.reporting.facts import read_facts
from hjepa_jax.reporting.publish import write_report
from hjepa_jax.reporting.sections import sections as run_sections
from hjepa_jax.reporting.verdicts import next_steps
from hjepa_jax.runs import history
from hjepa_jax.runs.load import load_state
from hjepa_jax.training import train
from tests import programs
from tests.conftest import draw_small, make_tiny_config

# Pictures are blank files. Only for `finished`, each figure is also drawn once, coarsely.
pytestmark = pytest.mark.usefixtures("blank_pictures")

SECTIONS = [
    "What was reached", "Checks", "Next steps", "Probes", "What it sees", "Features", "Loss",
    "Collapse indicators", "Warnings", "Schedules", "Speed and memory", "Checkpoints",
    "Parameters", "Configuration",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_run, shapes_npz) -> pathlib.Path:
    """The work directory of a finished run of 6 steps, with probes and a report."""
    c = make_tiny_config(shapes_npz)
    c.eval.probe_at_end = c.log.report = True
    workdir = shutil.copytree(tiny_run, tmp_path_factory.mktemp("runs") / "finished")
    with pytest.MonkeyPatch.context() as patch:
        programs.shorten_probes(patch)
        draw_small(patch, dpi=20)
        train.train_and_evaluate(c, workdir)
    return workdir


def read_metrics(workdir):
    return history.read_metrics(workdir / "metrics.jsonl")


def write_metrics(workdir, lines):
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def read_rows(workdir):
    return json.loads((workdir / "probe.json").read_text())["results"]


def report_sections(folder: pathlib.Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", (folder / "report.md").read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> list[list[list[str]]]:
    """Returns the cells of every Markdown table: the header row, then all rows of data."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def four(value: float) -> str:
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def best(rows, protocol, encoder):
    """Returns the row with the best held-out score. Ties: fewer dimensions, then pool, level."""
    pools = ["mean", "summary", "concat"]
    rows = [row for row in rows if (row["protocol"], row["encoder"]) == (protocol, encoder)]
    order = lambda r: (-r["chosen"]["val_top1"], r["dim"], pools.index(r["pool"]), str(r["level"]))
    return min(rows, key=order)


def test_the_end_of_a_run_writes_all_sections_and_figures(finished):
    assert list(report_sections(finished)) == SECTIONS
    pictures = re.findall(r"!\[.+\]\((.+)\)", (finished / "report.md").read_text())
    assert len(pictures) == len(set(pictures)) >= 15
    assert sorted(pictures) == sorted(f"figures/{p.name}" for p in (finished / "figures").iterdir())


def test_the_checklist_states_loss_probes_and_last_step(finished):
    found = report_sections(finished)
    reached, (checks,) = found["What was reached"], tables(found["Checks"])
    headline, origin = tables(reached)
    rows = read_rows(finished)
    trained = percent(best(rows, "linear", "target")["top1"])
    assert headline[0] == ["", "trained", "random-init", "raw pixels"]
    assert headline[1][1].startswith(f"{trained} (")
    assert "; chance is 10.00:" in reached
    assert re.findall(r"\((figures/.+)\)", reached) == [
        f"figures/{name}.png" for name in ("scores", "examples", "hidden")
    ]
    command = shlex.join(["python", *sys.orig_argv[1:]])
    assert f"\nCommand: `{command}`\n" in reached
    said = dict(zip(*origin, strict=True))
    assert said["status"] == "finished, step 6 of 6"
    assert "cores" in said["hardware"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", said["date"])
    said = {what: (mark, evidence) for mark, what, evidence in checks[1:]}
    assert said["Training reached its last step"] == ("✓", "step 6 of 6")
    assert said["The last step has a checkpoint"] == ("✓", "newest is step 6")
    loss = [line["train/loss"] for line in read_metrics(finished) if "train/loss" in line]
    mark = "✓" if loss[-1] < loss[0] else "✗"
    evidence = f"{four(loss[0])} to {four(loss[-1])}"
    assert said["The loss ended below its first value"] == (mark, evidence)
    rows = read_rows(finished)
    others = (("random_init", "random-init"), ("pixels", "raw pixels"))
    for protocol, (encoder, name) in itertools.product(("linear", "knn"), others):
        ours, theirs = (best(rows, protocol, e)["top1"] for e in ("target", encoder))
        low, high = difference(ours, theirs, 60, 60)
        mark = "✓" if low > 0.01 else "?" if ours - theirs > 0.01 else "✗"
        evidence = (
            f"{percent(ours)} against {percent(theirs)} % on 60 test images: "
            f"{100 * (ours - theirs):+.2f} points, "
            f"95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
        )
        probe = "the linear probe" if protocol == "linear" else "k-NN"
        what = f"Trained features beat {name} by more than 1.00 points in {probe}"
        assert said[what] == (mark, evidence)


def test_loss_and_speed_are_the_numbers_of_the_log(finished):
    found, lines = report_sections(finished), read_metrics(finished)
    lines = [line for line in lines if "train/loss" in line]
    (loss,) = tables(found["Loss"])
    names = ["train/loss", *(f"train/loss_{name}" for name in loss[0][3:])]
    for cells, line in ((loss[1], lines[0]), (loss[-2], lines[-1])):
        assert [*cells[:2], *cells[3:]] == [
            str(line["step"]),
            *(four(line[name]) for name in names),
        ]
    change = 100 * (lines[-1]["train/loss"] / lines[0]["train/loss"] - 1)
    assert loss[-2][2] == loss[-1][1] == f"{change:+.1f}"
    seconds = sum(2 / line["perf/steps_per_sec"] for line in lines)
    speed = dict(tables(found["Speed and memory"])[0])
    assert speed["steps per second, whole run"] == four(6 / seconds)
    memory = max(line["perf/peak_memory_bytes"] for line in lines)
    assert speed["peak memory (CPU: of the process)"] == f"{memory / 2**30:.2f} GiB"


def test_parameters_and_collapse_indicators_are_counted(finished):
    found = report_sections(finished)
    _, state, _ = load_state(finished)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    counts = dict(tables(found["Parameters"])[0][1:])
    assert counts["trained"] == f"{size(state.params):,}"
    assert counts["in total"] == f"{size(state.params) + size(state.target_params):,}"
    ranks = [
        x["train/effective_rank"] for x in read_metrics(finished) if "train/effective_rank" in x
    ]
    indicators = {name: values for name, *values in tables(found["Collapse indicators"])[0]}
    assert indicators["effective_rank"] == [four(ranks[0]), four(ranks[-1])]


def features_of(row):
    """Returns the first cell of the table row that shows `row`."""
    if row["encoder"] == "pixels":
        return f"raw pixels, as they are ({row['dim']})"
    level = "all levels" if row["level"] == "all" else f"level {row['level']}"
    pool = f"mean, {level}" if row["pool"] == "mean" else row["pool"]
    name = {"target": "trained", "random_init": "random-init"}[row["encoder"]]
    return f"{name}, {pool} ({row['dim']})" + (f", step {row['step']}" if row["step"] else "")


def test_every_probe_stands_in_the_table_with_its_interval(finished):
    (scores, *_) = tables(report_sections(finished)["Probes"])
    heads, rows = scores[0], read_rows(finished)
    for row in rows:
        if "top1" in row:
            (line,) = (line for line in scores if line[0] == features_of(row))
            low, high = wilson(row["top1"], row["test_size"])
            expected = f"{percent(row['top1'])} ({100 * low:.1f}-{100 * high:.1f})"
            name = "k-NN" if row["protocol"] == "knn" else row["protocol"]
            assert line[heads.index(name)] == expected
    assert scores[1][0].startswith("trained, "), "the trained encoder comes first"


def test_the_page_loads_nothing_and_holds_every_picture_twice(finished):
    page, text = ((finished / f"report.{end}").read_text() for end in ("html", "md"))
    assert not re.findall(r"""<script|(?:src|href|srcset)=["'](?!data:|#)""", page)
    num_pictures = len(list((finished / "figures").iterdir()))
    assert page.count("data:image/png;base64,") == 2 * num_pictures
    assert re.findall("<figcaption>(.+)</figcaption>", page) == re.findall(r"!\[(.+)\]", text)
    assert page.count("prefers-color-scheme: dark") == 1 + num_pictures
    (first,) = re.findall('<div class="row">(.*?)</div>', page, flags=re.S)
    assert first.count("<figure>") == 3, "the first screen shows three figures side by side"


def copy_of(workdir, tmp_path, *, without=(), **values):
    """Copies a work directory without its report; puts `values` into every line of its log."""
    target = shutil.copytree(
        workdir, tmp_path / "copy", ignore=shutil.ignore_patterns("report.*", "figures", *without)
    )
    if values:
        write_metrics(target, [line | values for line in read_metrics(target)])
    return target


def facts_of(workdir):
    return read_facts(workdir, images=False)


def test_a_run_without_checkpoint_has_a_report(finished, tmp_path):
    workdir = copy_of(finished, tmp_path, without=["checkpoints", "probe.json", "features"])
    write_report([workdir], workdir)
    found = report_sections(workdir)
    assert "there is no checkpoint yet" in found["What it sees"]
    assert "Loss" in found
    assert "not probed" in found["Checks"]
    assert "has not been probed" in found["What was reached"]
    assert not (workdir / "checkpoints").exists(), "reading must not create a folder"


def test_an_unreadable_checkpoint_leaves_a_report_without_pictures(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    (workdir / "checkpoints/6/meta/metadata").write_text("{")
    facts = read_facts(workdir, images=True)
    assert facts.look is None
    assert facts.no_look
    assert facts.history.last_step() == 6


def test_interrupted_and_running_are_told_apart(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()[:2]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "tra')
    found = parts_of(workdir)
    assert "interrupted, step 4 of 6" in found["What was reached"]
    assert "Run the same command again" in found["Next steps"]
    assert "still to come" in found["Speed and memory"]
    code = "import pathlib, sys, time; from hjepa_jax.runs.lock import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            assert facts_of(workdir).status == "running"
        finally:
            holder.kill()


@pytest.mark.parametrize(("num_lines", "status"), [(1, "interrupted"), (0, "not started")])
def test_a_log_with_at_most_one_line_has_a_report(finished, tmp_path, num_lines, status):
    workdir = copy_of(finished, tmp_path, without=["probe.json"])
    write_metrics(workdir, read_metrics(workdir)[:num_lines])
    found = parts_of(workdir)
    assert f"\n| {status}, step " in found["What was reached"]
    assert "nan" not in "".join(found.values()).lower().replace("nanmin", "")


def parts_of(workdir):
    """Returns the text of the sections, without files."""
    return {heading: text for heading, text, _ in run_sections(facts_of(workdir))}


def four_lines(workdir):
    """Returns the first line of the log for four steps; tests change the last three."""
    return [read_metrics(workdir)[0] | {"step": step} for step in (2, 3, 4, 6)]


def test_collapse_and_skipped_steps_are_reported_with_their_rules(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    first, *others = four_lines(workdir)
    first["train/effective_rank"] = 8.0  # the rank of the untrained network
    for line, rank in zip(others, (1.3, 1.2, 1.1), strict=True):
        line |= {"train/nonfinite_steps": 2, "train/effective_rank": rank}
    write_metrics(workdir, [first, *others])
    found = parts_of(workdir)
    assert "step 3: 2 steps so far were not finite" in found["Warnings"]
    assert "step 6: effective rank 1.1 is below 1.6" in found["Warnings"], (
        "the third low rank in a row"
    )
    assert found["Warnings"].count("- ") == 2, "each warning appears once, at its first step"
    assert "**collapsed** (effective rank 1.1 is below 1.6" in found["Collapse indicators"]
    assert "train/nonfinite_steps is 2, above 0" in found["Next steps"]
    assert "effective rank 1.1 is below 1.6" in found["Next steps"]


@pytest.mark.parametrize(
    ("explained", "positions", "is_suggested"),
    [(0.65, "sincos2d", True), (0.9, "sincos2d", False), (0.65, "rope2d", False)],
)
def test_rope_is_suggested_if_targets_depend_on_places(
    finished, tmp_path, explained, positions, is_suggested
):
    shares = {"train/position_share": 0.62, "train/explained_variance_level_0": explained}
    facts = facts_of(copy_of(finished, tmp_path, **shares))
    with facts.config.unlocked():
        facts.config.model.positions = positions
    rules = [rule for what, rule in next_steps(facts) if "model.positions=rope2d" in what]
    assert len(rules) == is_suggested
    assert all("train/position_share 0.620 is above 0.5" in rule for rule in rules)


def test_constant_features_are_collapsed_whatever_their_rank(finished, tmp_path):
    """Rounding noise around one point has full rank."""
    verdict = collapse_verdict(1 + 1e-6 * np.random.default_rng(0).normal(size=(512, 16)))
    names = ("effective_rank", "relative_std")
    values = {f"train/{name}": getattr(verdict, name) for name in names}
    workdir = copy_of(finished, tmp_path)
    first, *others = four_lines(workdir)
    write_metrics(workdir, [first, *(line | values for line in others)])
    found = parts_of(workdir)
    sign = f"relative std {verdict.relative_std:.2g} is below 0.01"
    assert f"| ✗ | Features have not collapsed | {sign}" in found["Checks"]
    assert f"**Verdict: collapsed: {sign}" in found["What was reached"]
    assert f"**collapsed** ({sign}" in found["Collapse indicators"]
    assert f"step 6: {sign}" in found["Warnings"]
    assert sign in found["Next steps"]


def test_several_runs_stand_side_by_side(finished, tmp_path):
    other = copy_of(finished, tmp_path)
    config = json.loads((other / "config.json").read_text())
    config["seed"] = 7
    (other / "config.json").write_text(json.dumps(config))
    write_report([finished, other], tmp_path / "out")
    found = report_sections(tmp_path / "out")
    (table,) = tables(found["Side by side"])
    assert table[0] == ["", "finished", "copy"]
    last = read_metrics(finished)[-1]
    assert ["loss", *[four(last["train/loss"])] * 2] in table
    (differing,) = tables(found["Configurations"])
    assert differing[1:] == [["`seed`", "`0`", "`7`"]]
    (probes,) = tables(found["Probes"])
    row = next(r for r in read_rows(finished) if (r["encoder"], r["pool"]) == ("target", "summary"))
    label = f"{row['protocol']}, target summary level {row['level']}"
    assert [label, percent(row["top1"]), percent(row["top1"]), "0.00"] in probes

    config["optim"]["learning_rate"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    write_report([finished, other], tmp_path / "out")
    text = report_sections(tmp_path / "out")["Probes"]
    assert "no standard deviation, because the runs differ in optim.learning_rate (" in text
    assert [label, percent(row["top1"]), percent(row["top1"])] in tables(text)[0]


def test_a_sampled_log_says_how_many_lines_were_read(finished, tmp_path):
    """experiments/long_log has the time for three million lines."""
    workdir = copy_of(finished, tmp_path)
    rates = {"perf/steps_per_sec": 4.0, "perf/images_per_sec": 64.0}
    steps = range(1, 20_001)
    write_metrics(workdir, [{"step": step, "train/loss": 1 / step} | rates for step in steps])
    found = parts_of(workdir)
    assert "metrics.jsonl has 20000 lines; " in found["What was reached"]
    (table,) = tables(found["Loss"])
    assert (table[1][:2], table[-2][:2]) == (["1", "1"], ["20000", "5e-05"])
    assert "time in steps, so far | 1:23:20" in found["Speed and memory"], (
        "20,000 steps at 4 per second take 5,000 seconds"
    )


def test_free_device_memory_is_reported_with_its_numbers(finished):
    facts = facts_of(finished)
    assert facts.device_memory is None, "a CPU does not report its memory"
    peak = facts.history.last("perf/peak_memory_bytes")
    assert peak is not None
    for memory, is_free in ((3 * peak, True), (1.5 * peak, False)):
        meta = {"versions": {"device memory": f"{memory:.0f}"}}
        rules = [rule for _, rule in next_steps(dataclasses.replace(facts, meta=meta))]
        sizes = f"{peak / 2**30:.2f} GiB, is below 50.00 % of the device's {memory / 2**30:.2f} GiB"
        assert any(sizes in rule for rule in rules) == is_free


@pytest.mark.parametrize(("last", "is_named"), [(0.845, False), (0.8, False), (0.4, True)])
def test_a_run_that_ended_below_its_best_names_that_step(finished, tmp_path, last, is_named):
    workdir = copy_of(finished, tmp_path)
    scores = [(2, 0.3), (4, 0.85), (5, 0.7), (6, last)]  # 5 points of 40 images may be chance
    write_metrics(workdir, [{"step": step, "eval/knn_top1": knn} for step, knn in scores])
    sentence = "eval/knn_top1 ended at 40.00 %, below the 85.00 % of step 4"
    assert (sentence in [rule for _, rule in next_steps(facts_of(workdir))]) == is_named


@pytest.mark.parametrize(
    ("scores", "verdict", "advice"),
    [  # trained, random-init and raw pixels
        ((0.9, 0.3, 0.3), "Verdict: better than random-init and raw pixels, in the linear", ""),
        ((0.3, 0.9, 0.1), "not better than random-init in the linear probe", "agreement_weight=2"),
        ((0.3, 0.3, 0.9), "not better than random-init", "=optim.learning_rate=0.00033,0.001,"),
        ((0.5, 0.4, 0.1), "perhaps better than random-init", "hjepa sweep --seeds=0,1,2"),
    ],
)
def test_the_next_steps_follow_from_the_verdict(finished, tmp_path, scores, verdict, advice):
    workdir = copy_of(finished, tmp_path)
    by_encoder = dict(zip(("target", "random_init", "pixels"), scores, strict=True))
    rows = [row | {"top1": by_encoder[row["encoder"]]} for row in read_rows(workdir)]
    (workdir / "probe.json").write_text(json.dumps({"results": rows}))
    found = parts_of(workdir)
    assert verdict in found["What was reached"]
    assert advice in found["Next steps"]
    trained_longer = "`train.num_epochs` (now 0.4)" in found["Next steps"]
    assert trained_longer == verdict.startswith("not better")


def test_a_directory_without_a_run_is_refused_in_one_line(run_module, tmp_path):
    (tmp_path / "config.json").write_text('{"model": {"tower": 3}}')
    result = run_module("hjepa_jax.report", f"--workdir={tmp_path}")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "--workdir" in line
    assert "model.tower" in line
    assert not (tmp_path / "report.md").exists()


def test_the_command_writes_and_names_its_files(run_module, finished, tmp_path):
    result = run_module(
        "hjepa_jax.report", f"--workdir={finished}", f"--output={tmp_path}", "--noimages"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    assert result.stderr == ""


def test_rows_on_other_data_and_of_other_seeds_are_told_apart(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    own, before = read_rows(workdir), facts_of(workdir)
    perfect = {"top1": 1.0, "chosen": {"val_top1": 1.0}}
    other = [row | perfect | {"data": "tfds:other", "train_size": 7} for row in own]
    lucky = [row | perfect | {"seed": 3} for row in own]
    (workdir / "probe.json").write_text(json.dumps({"results": [*other, *own, *lucky]}))
    found, facts = parts_of(workdir), facts_of(workdir)
    assert "100.00" not in found["What was reached"]
    assert (facts.num_steps, facts.status) == (before.num_steps, before.status)
    table = tables(found["Probes"])[0]
    places = {(r["encoder"], r["pool"], r["level"]) for r in own}
    assert len({line[0] for line in table[1:]}) == len(table) - 1 == 3 * len(places)
    assert sum(", data tfds:other, seed 0" in line[0] for line in table[1:]) == len(places)


def test_rows_of_pixels_alone_have_a_table_and_no_bars(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    rows = [row for row in read_rows(workdir) if row["encoder"] == "pixels"]
    (workdir / "probe.json").write_text(json.dumps({"results": rows}))
    sections = run_sections(facts_of(workdir))
    _, text, figures = next(part for part in sections if part[0] == "Probes")
    assert "pixels" in text
    assert not [name for name in figures if name.startswith("probe_")]
