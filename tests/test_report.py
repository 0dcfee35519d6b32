"""The report: every number of it recomputed, and workdirs of every kind."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from hjepa_jax import build, checkpoint, run, run_dir, train
from hjepa_jax.array_table import json_checksum
from hjepa_jax.config import base_config
from hjepa_jax.evaluation.quality import collapse_verdict
from hjepa_jax.fields import flatten
from hjepa_jax.publish import write_report
from hjepa_jax.run_facts import read_facts
from hjepa_jax.run_report import sections as run_sections
from hjepa_jax.verdicts import next_steps
from tests import programs
from tests.conftest import REPOSITORY
from tests.kept_checkpoint import read_checkpoint
from tests.report_numbers import (
    WORDS,
    Checkpoint,
    Sources,
    four,
    percent,
    problems,
    read_sections,
    read_sources,
    tables,
)

# The report of `finished` is drawn, those that tests write themselves have blank pictures.
pytestmark = pytest.mark.usefixtures("blank_pictures")

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
    with pytest.MonkeyPatch.context() as patch:
        programs.shorten_probes(patch)
        train.train_and_evaluate(c.lock(), workdir)
    return workdir


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def report_sections(folder: pathlib.Path) -> dict[str, str]:
    return read_sections((folder / "report.md").read_text())


@pytest.fixture(scope="module")
def sources(finished, shapes_npz) -> Sources:
    """What the report of `finished` is to say, its checkpoint included."""
    _, state, _ = checkpoint.load_state(finished)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    params = {name: size(tree) for name, tree in sorted(state.params.items())}
    return read_sources(
        finished,
        defaults=flatten(base_config().to_dict()),
        params={**params, "target_encoder": size(state.target_params)},
        width=16,
        num_images=240,
        saved=8,
        checkpoint=read_checkpoint(finished),
    )


def test_the_end_of_a_run_writes_all_sections_and_figures(finished):
    found = report_sections(finished)
    assert list(found) == SECTIONS
    pictures = re.findall(r"!\[.+\]\((.+)\)", (finished / "report.md").read_text())
    assert len(pictures) == len(set(pictures)) >= 15
    assert sorted(pictures) == sorted(f"figures/{p.name}" for p in (finished / "figures").iterdir())


def test_every_number_of_the_report_is_recomputed(finished, sources):
    assert problems((finished / "report.md").read_text(), sources) == []


def test_a_number_that_is_not_so_is_found_in_every_section(finished, sources):
    """Each number of the report is changed once, in its last digit."""
    report, changed = (finished / "report.md").read_text(), dict.fromkeys(SECTIONS, 0)
    for heading, text in read_sections(report).items():
        for number in re.finditer(r"\d+", text):
            if text[: number.end()].endswith(WORDS):
                continue
            end = number.end()
            other = text[: end - 1] + str((int(text[end - 1]) + 1) % 10) + text[end:]
            assert problems(report.replace(text, other), sources), text[end - 20 : end + 20]
            changed[heading] += 1
    assert [heading for heading, count in changed.items() if not count] == ["Warnings"]


KEPT = sorted((REPOSITORY / "experiments").glob("*/report"))
SAVED = {  # newest checkpoint
    "cifar10_tiny": 4686, "cifar10_tiny_20": 3900, "m1_max_quick_val": 1192, "shapes_tiny": 624,
}  # fmt: skip
NUM_IMAGES = {"tfds:cifar10": 50_000, "shapes": 5_000}


@pytest.mark.parametrize("folder", KEPT, ids=[folder.parent.name for folder in KEPT])
def test_every_number_of_a_kept_report_is_recomputed_from_the_files_beside_it(folder):
    """What its checkpoint said is in checkpoint.json; without that, it is checked in form alone."""
    for name in ("metrics.jsonl", "config.json"):  # and probe.json, of a run that was probed
        assert (folder / name).exists(), f"keep {name} of the run in {folder}"
    config = run_dir.load_config(folder)
    model = build.build_model(config)
    state = jax.eval_shape(build.build_create_state(config, model, optax.identity()))
    params = {name: run.num_params(tree) for name, tree in sorted(state.params.items())}
    known = folder / "checkpoint.json"
    sources = read_sources(
        folder,
        defaults=flatten(base_config().to_dict()),
        params={**params, "target_encoder": run.num_params(state.target_params)},
        width=model.context_encoder.width,
        num_images=NUM_IMAGES[config.data.source],
        saved=SAVED[folder.parent.name],
        checkpoint=Checkpoint(**json.loads(known.read_text())) if known.exists() else None,
    )
    rules = [dataclasses.replace(sources, beside_untrained=known) for known in (True, False)]
    found = [problems((folder / "report.md").read_text(), rule) for rule in rules]
    assert [] in found, found


def test_every_kept_report_is_checked():
    assert [folder.parent.name for folder in KEPT] == sorted(SAVED)


def test_the_page_loads_nothing_and_holds_every_picture_twice(finished):
    page = (finished / "report.html").read_text()
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:)""", page)
    assert "<script" not in page
    pictures = list((finished / "figures").iterdir())
    assert page.count("data:image/png;base64,") == 2 * len(pictures)
    captions = re.findall(r"!\[(.+)\]", (finished / "report.md").read_text())
    assert re.findall("<figcaption>(.+)</figcaption>", page) == captions
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
    found = report_sections(workdir)
    assert "there is no checkpoint yet" in found["What it sees"]
    assert "Loss" in found
    assert "not probed" in found["What was reached"]
    assert not (workdir / "checkpoints").exists(), "reading leaves no trace"


def test_an_interrupted_run_is_told_from_a_running_one(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()[:2]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "tra')
    write_report([workdir], workdir, images=False)
    found = report_sections(workdir)
    assert "**Status: interrupted**, step 4 of 8." in found["What was reached"]
    assert "Run the same command again" in found["Next steps"]
    assert "still to come" in found["Speed and memory"]
    code = "import pathlib, sys, time; from hjepa_jax.run_dir import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            write_report([workdir], workdir, images=False)
        finally:
            holder.kill()
    found = report_sections(workdir)
    assert "**Status: running**" in found["What was reached"]


def test_a_run_of_one_line_and_one_of_none_have_a_report(finished, tmp_path):
    workdir = copy_of(finished, tmp_path, without=["probe.json"])
    line = (workdir / "metrics.jsonl").read_text().splitlines()[0]
    for text, status in ((line + "\n", "interrupted"), ("", "not started")):
        (workdir / "metrics.jsonl").write_text(text)
        write_report([workdir], workdir, images=False)
        found = report_sections(workdir)
        assert f"**Status: {status}**" in found["What was reached"]
        assert "nan" not in (workdir / "report.md").read_text().lower().replace("nanmin", "")


def test_collapse_and_steps_left_out_are_told_with_their_rules(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    lines = read_metrics(workdir)
    lines[0]["train/effective_rank"] = 8.0  # of the untrained network
    for line, rank in zip(lines[1:], (1.3, 1.2, 1.1), strict=True):
        line |= {"train/nonfinite_steps": 2, "train/effective_rank": rank}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([workdir], workdir, images=False)
    found = report_sections(workdir)
    assert "step 4: 2 steps in all were not finite" in found["Warnings"]
    assert "step 8: effective rank 1.1 is below 1.6" in found["Warnings"], "the third in a row"
    assert found["Warnings"].count("- ") == 2, "each is told once, when it begins"
    assert "**collapsed** (effective rank 1.1 is below 1.6" in found["Collapse indicators"]
    assert "train/nonfinite_steps is 2, above 0" in found["Next steps"]
    assert "effective rank 1.1 is below 1.6" in found["Next steps"]


def test_targets_that_are_maps_of_places_are_told_with_what_helps(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    lines = read_metrics(workdir)
    lines[-1]["train/position_share"] = 0.62
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([workdir], workdir, images=False)
    found = report_sections(workdir)
    assert "| position_share |" in found["Collapse indicators"]
    assert "train/position_share 0.620 is above 0.5" in found["Next steps"]
    assert "model.positions=rope2d" in found["Next steps"]

    lines[-1]["train/explained_variance_level_0"] = 0.9  # far more than places alone could
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([workdir], workdir, images=False)
    assert "position_share" not in report_sections(workdir)["Next steps"]

    lines[-1]["train/explained_variance_level_0"] = 0.65
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["positions"] = "rope2d"  # as it is already
    (workdir / "config.json").write_text(json.dumps(config))
    write_report([workdir], workdir, images=False)
    assert "position_share" not in report_sections(workdir)["Next steps"]


def test_constant_features_are_called_collapsed_whatever_their_rank(tmp_path):
    """Rounding noise around one point has full rank."""
    x = 1 + 1e-6 * np.random.default_rng(0).normal(size=(512, 192))
    verdict = collapse_verdict(x)
    kept = REPOSITORY / "experiments/cifar10_tiny/report"
    shutil.copy(kept / "config.json", tmp_path)
    lines = read_metrics(kept)
    for line in lines[-3:]:
        line["train/effective_rank"] = verdict.effective_rank
        line["train/relative_std"] = verdict.relative_std
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = read_facts(tmp_path, images=False)
    assert verdict.effective_rank > 9 * facts.limits.effective_rank
    parts = {heading: text for heading, text, _ in run_sections(facts)}
    sign = f"relative std {verdict.relative_std:.2g} is below 0.01"
    assert f"| ✗ | Features have not collapsed | {sign}" in parts["What was reached"]
    assert f"**collapsed** ({sign})" in parts["Collapse indicators"]
    assert f"step {lines[-1]['step']}: {sign}" in parts["Warnings"]
    assert sign in parts["Next steps"]


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
    rows = json.loads((finished / "probe.json").read_text())["results"]
    (probes,) = tables(found["Probes"])
    row = next(r for r in rows if (r["encoder"], r["pool"]) == ("target", "summary"))
    label = f"{row['protocol']}, target summary level {row['level']}"
    assert [label, percent(row["top1"]), percent(row["top1"]), "0.00"] in probes


@pytest.mark.slow
def test_of_three_million_lines_the_ends_and_the_evaluations_are_reported(finished, tmp_path):
    """How long that takes is in experiments/long_log."""
    workdir = copy_of(finished, tmp_path)
    last, rates = 3_000_000, '"perf/steps_per_sec": 4.0, "perf/images_per_sec": 64.0'
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(1, last):
            file.write(f'{{"step": {step}, "train/loss": 2.5, {rates}}}\n')
            if step == 1_234_567:
                file.write(f'{{"step": {step}, "eval/knn_top1": 0.4321}}\n')
        file.write(f'{{"step": {last}, "train/loss": 1.25, "eval/knn_top1": 0.5, {rates}}}\n')
    write_report([workdir], workdir, images=False)
    found = report_sections(workdir)
    assert "metrics.jsonl has 3000001 lines, of which" in found["What was reached"]
    assert f"**Status: finished**, step {last} of 8." in found["What was reached"]
    assert "43.21 to 50.00 %" in found["What was reached"]
    (table,) = tables(found["Loss"])
    assert (table[1][:2], table[-2][:2]) == (["1", "2.5"], [str(last), "1.25"])
    assert "time in steps, so far | 208:20:00" in found["Speed and memory"], "750,000 seconds"


def test_a_checkpoint_of_a_newer_version_is_named_and_the_numbers_are_reported(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    path = workdir / "checkpoints/8/meta/metadata"
    meta = json.loads(path.read_text()) | {"format_version": 99}
    del meta["checksum"]
    path.write_text(json.dumps({**meta, "checksum": json_checksum(meta)}))
    write_report([workdir], workdir)
    found = report_sections(workdir)
    assert "is in format 99; this version reads up to" in found["What it sees"]
    assert found["Loss"] == report_sections(finished)["Loss"]


def test_room_on_the_device_is_told_with_its_numbers(finished):
    facts = read_facts(finished, images=False)
    assert facts.device_memory is None, "a CPU does not tell"
    peak = facts.history.last("perf/peak_memory_bytes")
    assert peak is not None
    for memory, is_told in ((3 * peak, True), (1.5 * peak, False)):
        meta = {"versions": {"device memory": f"{memory:.0f}"}}
        rules = [rule for _, rule in next_steps(dataclasses.replace(facts, meta=meta))]
        sizes = f"{peak / 2**30:.2f} GiB, is below 50.00 % of the device's {memory / 2**30:.2f} GiB"
        assert any(sizes in rule for rule in rules) == is_told


@pytest.mark.parametrize(("last", "is_told"), [(0.845, False), (0.8, False), (0.4, True)])
def test_a_run_that_ended_below_its_best_points_to_that_checkpoint(
    finished, tmp_path, last, is_told
):
    workdir = copy_of(finished, tmp_path)
    scores = [(2, 0.3), (4, 0.85), (6, 0.7), (8, last)]  # five points of 40 images are chance
    lines = (f'{{"step": {step}, "eval/knn_top1": {knn}}}\n' for step, knn in scores)
    (workdir / "metrics.jsonl").write_text("".join(lines))
    rules = [rule for _, rule in next_steps(read_facts(workdir, images=False))]
    told = "eval/knn_top1 ended at 40.00 %, below the 85.00 % of step 4"
    assert (told in rules) == is_told


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


def test_rows_on_other_data_and_of_other_seeds_are_told_apart(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    path = workdir / "probe.json"
    own = json.loads(path.read_text())["results"]
    before = read_facts(workdir, images=False)
    other = [
        r | {"data": "tfds:other", "top1": 1.0, "train_size": 7, "chosen": {"val_top1": 1.0}}
        for r in own
    ]
    lucky = [r | {"seed": 3, "top1": 1.0, "chosen": {"val_top1": 1.0}} for r in own]
    path.write_text(json.dumps({"results": [*other, *own, *lucky]}))
    write_report([workdir], workdir, images=False)
    found = report_sections(workdir)
    assert "100.00" not in found["What was reached"]
    facts = read_facts(workdir, images=False)
    assert (facts.num_steps, facts.status) == (before.num_steps, before.status)
    table = tables(found["Probes"])[0]
    assert table[0][5:7] == ["data", "seed"]
    places = {(r["encoder"], r["pool"], r["level"]) for r in own}
    assert len({tuple(line[:7]) for line in table[1:]}) == len(table) - 1 == 3 * len(places)


def test_pixels_alone_have_a_table_and_no_bars(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    path = workdir / "probe.json"
    rows = [r for r in json.loads(path.read_text())["results"] if r["encoder"] == "pixels"]
    path.write_text(json.dumps({"results": rows}))
    write_report([workdir], workdir, images=False)
    assert "pixels" in report_sections(workdir)["Probes"]
    assert not list((workdir / "figures").glob("probe_*.png"))
