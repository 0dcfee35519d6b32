"""The report: every number of it recomputed, and workdirs of every kind."""

import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys

import jax
import numpy as np
import pytest

from hjepa_jax import build, checkpoint, train
from hjepa_jax.config import base_config
from hjepa_jax.data.sources import open_source
from hjepa_jax.evaluation.knn import knn_predict
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.quality import collapse_verdict
from hjepa_jax.logging import format_duration
from hjepa_jax.publish import write_report

SECTIONS = [
    "What was reached", "Configuration", "Parameters", "Speed and memory", "Loss", "Schedules",
    "Collapse indicators", "Warnings", "Probes", "What it sees", "Features", "Checkpoints",
    "Next steps",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shapes_npz) -> pathlib.Path:
    """A workdir of a run of 8 steps with probes and, of its end, a report."""
    c = base_config()
    c.data.source, c.data.image_size = shapes_npz, 16
    c.model.width, c.model.depth, c.model.num_heads = 16, 1, 2
    c.model.predictor_width, c.model.predictor_depth, c.model.predictor_num_heads = 8, 1, 2
    c.mask.num_blocks, c.mask.scale = 2, (0.25, 0.25)
    c.train.batch_size, c.train.num_steps, c.train.checkpoint_every_steps = 16, 8, 4
    c.eval.every_epochs, c.eval.num_val, c.eval.knn_bank_size = 0.25, 40, 100
    c.eval.batch_size, c.log.every_steps, c.log.tensorboard = 60, 2, False
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train.train_and_evaluate(c.lock(), workdir)
    return workdir


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_sections(path: pathlib.Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", path.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> list[list[list[str]]]:
    """Cells of every Markdown table, the heads first, the rule left out."""
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


def test_the_end_of_a_run_writes_all_sections_and_figures(finished):
    found = read_sections(finished / "report.md")
    assert list(found) == SECTIONS
    pictures = re.findall(r"!\[.+\]\((.+)\)", (finished / "report.md").read_text())
    assert len(pictures) == len(set(pictures)) >= 15
    assert sorted(pictures) == sorted(f"figures/{p.name}" for p in (finished / "figures").iterdir())


def test_every_number_of_the_loss_table_is_that_of_its_line(finished):
    lines = {line["step"]: line for line in read_metrics(finished)}
    (table,) = tables(read_sections(finished / "report.md")["Loss"])
    names = [f"train/{head}" for head in table[0][1:-1]]
    assert set(names) == {n for line in lines.values() for n in line if n.startswith("train/loss")}
    first, last = lines[min(lines)], lines[max(lines)]
    assert [row[0] for row in table[1:]] == ["2", "4", "6", "8", "change, %"]
    for row in table[1:-1]:
        line = lines[int(row[0])]
        assert row[1:-1] == [four(line[name]) for name in names]
        assert row[-1] == f"{100 * (line['train/loss'] / first['train/loss'] - 1):+.1f}"
    changes = [f"{100 * (last[name] / first[name] - 1):+.1f}" for name in names]
    assert table[-1][1:-1] == changes


def test_every_number_of_the_speed_table_is_recomputed(finished):
    lines = [line for line in read_metrics(finished) if "perf/steps_per_sec" in line]
    rates, before, seconds = [line["perf/steps_per_sec"] for line in lines], 0, 0.0
    for line in lines:
        seconds += (line["step"] - before) / line["perf/steps_per_sec"]
        before = line["step"]
    overall = before / seconds
    images = statistics.median(line["perf/images_per_sec"] for line in lines)
    memory = max(line["perf/peak_memory_bytes"] for line in lines)
    (table,) = tables(read_sections(finished / "report.md")["Speed and memory"])
    assert dict(table[1:]) == {
        "steps per second, whole run": four(overall),
        "steps per second, median line": four(statistics.median(rates)),
        "images per second, median line": four(images),
        "time in steps, so far": format_duration(seconds),
        "time per epoch": format_duration(15 / overall),
        "whole run, estimated from the first line": format_duration(8 / rates[0]),
        "waiting for data, newest line": f"{percent(lines[-1]['perf/data_wait_fraction'])} %",
        "peak memory (CPU: of the process)": f"{memory / 2**30:.2f} GiB",
    }


def test_schedules_and_collapse_indicators_are_first_and_newest_values(finished):
    lines, sections = read_metrics(finished), read_sections(finished / "report.md")
    (schedules,) = tables(sections["Schedules"])
    for name, *cells in schedules[1:]:
        values = [line[f"train/{name.replace(' ', '_')}"] for line in lines]
        assert cells == [four(values[0]), four(max(values)), four(values[-1])]
    (indicators,) = tables(sections["Collapse indicators"])
    assert len(indicators) == 5
    for name, *cells in indicators[1:]:
        values = [line[f"train/{name}"] for line in lines]
        assert cells == [four(values[0]), four(values[-1])]
    rank = lines[-1]["train/effective_rank"]
    assert f"({rank:.1f} of at most 16; threshold 1.6)" in sections["Collapse indicators"]


def test_the_probe_table_is_probe_json(finished):
    rows = json.loads((finished / "probe.json").read_text())["results"]
    (table,) = tables(read_sections(finished / "report.md")["Probes"])
    found = {
        (*row[:5], protocol): score
        for row in table[1:]
        for protocol, score in zip(table[0][5:], row[5:], strict=True)
    }
    expected = {}
    for row in rows:
        key = (row["encoder"], row["step"], row["pool"], row["level"], row["dim"], row["protocol"])
        expected[tuple(map(str, key))] = percent(row["top1"])
    assert found == expected


def test_configuration_parameters_and_checkpoints_are_those_of_their_files(finished):
    sections = read_sections(finished / "report.md")
    config = json.loads((finished / "config.json").read_text())
    fields, versions = tables(sections["Configuration"])
    for field, value in fields[1:]:
        saved = config
        for name in field.strip("`").split("."):
            saved = saved[name]
        assert value == f"`{saved}`"
    shown = {field.strip("`") for field, _ in fields[1:]}
    assert shown >= {"model.width", "mask.scale", "eval.num_val", "log.every_steps", "seed"}
    assert dict(versions[1:])["jax"] == f"`{jax.__version__}`"

    _, state, _ = checkpoint.load_state(finished)
    (parts,) = tables(sections["Parameters"])
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    expected = {name.replace("_", " "): size(tree) for name, tree in state.params.items()}
    expected |= {"target encoder": size(state.target_params), "trained": size(state.params)}
    expected["in total"] = size(state.params) + size(state.target_params)
    assert dict(parts[1:]) == {name: f"{count:,}" for name, count in expected.items()}

    (kept,) = tables(sections["Checkpoints"])
    scores = {line["step"]: line.get("eval/knn_top1") for line in read_metrics(finished)}
    assert len(kept) == 3
    for step, megabytes, score in kept[1:]:
        files = (finished / "checkpoints" / step).rglob("*")
        num_bytes = sum(file.stat().st_size for file in files if file.is_file())
        assert megabytes == f"{num_bytes / 1e6:.1f} MB"
        assert score == percent(scores[int(step)])


def test_what_is_said_of_features_is_recomputed_from_the_checkpoint(finished, shapes_npz):
    model, params = checkpoint.load_encoder(finished)
    config = base_config()
    config.update(json.loads((finished / "config.json").read_text()))
    embed = jax.jit(build.build_embed_fn(config, model))
    split, _ = open_source(shapes_npz, data_dir=None, image_size=16).load()
    bank, held_out = hold_out(240, num_val=40)
    x, q = (np.asarray(embed(params, split.images[r])["level_0"]) for r in (bank, held_out))
    (predictions,) = knn_predict(x, split.labels[bank], q, ks=[20], num_classes=10)
    top1 = float((predictions == split.labels[held_out]).mean())
    sections = read_sections(finished / "report.md")
    said = "40 held-out training images beside 200 others, target encoder at step 8, level 0, "
    said += f"mean over patches. k-NN with k = 20 gets {percent(top1)} % of them right."
    assert said in sections["Features"]
    verdict = collapse_verdict(q)
    said = f"**{verdict.label}**, effective rank {verdict.effective_rank:.1f} of {verdict.max_rank}"
    assert f"{said}, relative std {verdict.relative_std:.3f}" in sections["Collapse indicators"]


def test_the_checklist_is_ticked_by_the_data(finished):
    lines = read_metrics(finished)
    rows = json.loads((finished / "probe.json").read_text())["results"]
    best = lambda protocol, encoder: max(
        r["top1"] for r in rows if (r["protocol"], r["encoder"]) == (protocol, encoder)
    )
    knn = [line["eval/knn_top1"] for line in lines if "eval/knn_top1" in line]
    loss = [line["train/loss"] for line in lines]
    rank = lines[-1]["train/effective_rank"]
    expected = [
        (True, "step 8 of 8"),
        (True, "0 steps left out"),
        (loss[-1] < loss[0], f"{four(loss[0])} to {four(loss[-1])}"),
        (rank >= 1.6, f"effective rank {rank:.1f}, threshold 1.6 of 16"),
        (knn[-1] > knn[0], f"{percent(knn[0])} to {percent(knn[-1])} %"),
    ]
    for protocol in ("linear", "knn"):
        for encoder in ("random_init", "pixels"):
            ours, theirs = best(protocol, "target"), best(protocol, encoder)
            evidence = f"{percent(ours)} against {percent(theirs)} %"
            expected.append((ours > theirs + 0.01, evidence))
    expected.append((True, "newest is step 8"))
    (table,) = tables(read_sections(finished / "report.md")["What was reached"])
    assert [(row[0], row[2]) for row in table[1:]] == [
        ("✓" if ok else "✗", s) for ok, s in expected
    ]


def test_the_page_loads_nothing_and_holds_every_picture_twice(finished):
    page = (finished / "report.html").read_text()
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:)""", page)
    assert "<script" not in page
    pictures = list((finished / "figures").iterdir())
    assert page.count("data:image/png;base64,") == 2 * len(pictures)
    assert page.count("prefers-color-scheme: dark") == 1 + len(pictures)


def copy_of(workdir, tmp_path, *, without=()):
    target = tmp_path / "copy"
    shutil.copytree(workdir, target)
    for name in ("report.md", "report.html", "figures", *without):
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return target


def test_a_run_without_checkpoint_says_so_and_shows_its_numbers(finished, tmp_path):
    workdir = copy_of(finished, tmp_path, without=["checkpoints", "probe.json", "features"])
    write_report([workdir], workdir)
    found = read_sections(workdir / "report.md")
    assert "there is no checkpoint yet" in found["What it sees"]
    assert "Loss" in found
    assert "not probed" in found["What was reached"]
    assert not (workdir / "checkpoints").exists(), "reading leaves no trace"


def test_an_interrupted_run_is_told_from_a_running_one(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()[:2]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "tra')
    write_report([workdir], workdir, images=False)
    found = read_sections(workdir / "report.md")
    assert "**Status: interrupted**, step 4 of 8." in found["What was reached"]
    assert "Run the same command again" in found["Next steps"]
    assert "still to come" in found["Speed and memory"]
    holder = subprocess.Popen(
        [sys.executable, "-c", "import pathlib, sys, time; from hjepa_jax.run import locked\n"
         "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)",
         str(workdir)],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        write_report([workdir], workdir, images=False)
    finally:
        holder.kill()
        holder.wait()
    found = read_sections(workdir / "report.md")
    assert "**Status: running**" in found["What was reached"]


def test_a_run_of_one_line_and_one_of_none_have_a_report(finished, tmp_path):
    workdir = copy_of(finished, tmp_path, without=["probe.json"])
    line = (workdir / "metrics.jsonl").read_text().splitlines()[0]
    for text, status in ((line + "\n", "interrupted"), ("", "not started")):
        (workdir / "metrics.jsonl").write_text(text)
        write_report([workdir], workdir, images=False)
        found = read_sections(workdir / "report.md")
        assert f"**Status: {status}**" in found["What was reached"]
        assert "nan" not in (workdir / "report.md").read_text().lower().replace("nanmin", "")


def test_collapse_and_steps_left_out_are_told_with_their_rules(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    lines = read_metrics(workdir)
    lines[1]["train/nonfinite_steps"] = 2
    lines[2] |= {"train/nonfinite_steps": 2, "train/effective_rank": 1.2}
    lines[3] |= {"train/nonfinite_steps": 2, "train/effective_rank": 1.1}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([workdir], workdir, images=False)
    found = read_sections(workdir / "report.md")
    assert "step 4: 2 steps in all were not finite" in found["Warnings"]
    assert "step 6: effective rank 1.2, below 1.6" in found["Warnings"]
    assert found["Warnings"].count("- ") == 2, "each is told once, when it begins"
    assert "**collapsed** (1.1 of at most 16; threshold 1.6)" in found["Collapse indicators"]
    assert "train/nonfinite_steps is 2, above 0" in found["Next steps"]
    assert "effective rank 1.1 is below 1.6" in found["Next steps"]


def test_several_runs_stand_side_by_side(finished, tmp_path):
    other = copy_of(finished, tmp_path)
    config = json.loads((other / "config.json").read_text())
    config["seed"] = 7
    (other / "config.json").write_text(json.dumps(config))
    write_report([finished, other], tmp_path / "out")
    found = read_sections(tmp_path / "out" / "report.md")
    (table,) = tables(found["Side by side"])
    assert table[0] == ["", "finished", "copy"]
    last = read_metrics(finished)[-1]
    assert ["loss", *[four(last["train/loss"])] * 2] in table
    (differing,) = tables(found["Configurations"])
    assert differing[1:] == [["`seed`", "`0`", "`7`"]]
    rows = json.loads((finished / "probe.json").read_text())["results"]
    (probes,) = tables(found["Probes"])
    row = next(r for r in rows if (r["encoder"], r["pool"]) == ("target", "summary"))
    label = f"{row['protocol']}, target summary level {row['level']}"
    assert [label, percent(row["top1"]), percent(row["top1"]), "0.00"] in probes


def test_a_long_log_is_reported_from_a_bounded_number_of_its_lines(finished, tmp_path):
    """300,000 lines here."""
    workdir = copy_of(finished, tmp_path)
    rest = (workdir / "metrics.jsonl").read_text().splitlines()[0].partition(",")[2]
    with (workdir / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step},{rest}\n' for step in range(1, 300_001))
    write_report([workdir], workdir, images=False)
    assert "has 300000 lines" in read_sections(workdir / "report.md")["What was reached"]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda w: None, "holds no run"),
        (lambda w: (w / "config.json").write_text("{"), "is no config of this version"),
        (lambda w: (w / "config.json").write_text('{"model": {"tower": 3}}'), "model.tower"),
    ],
    ids=["empty", "broken", "old"],
)
def test_a_directory_that_holds_no_run_ends_in_one_line_and_status_2(
    run_module, tmp_path, prepare, words
):
    prepare(tmp_path)
    result = run_module("hjepa_jax.report", f"--workdir={tmp_path}")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "--workdir" in line
    assert words in line
    assert not (tmp_path / "report.md").exists()


def test_the_command_writes_and_names_its_files(run_module, finished, tmp_path):
    result = run_module(
        "hjepa_jax.report", f"--workdir={finished}", f"--output={tmp_path}", "--noimages"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    assert result.stderr == ""
