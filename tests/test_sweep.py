"""`hjepa sweep` trains each named run once and compares all on held-out training images."""

import copy
import csv
import dataclasses
import json
import pathlib
import runpy
import statistics
from typing import Any

import pytest

from hjepa_jax.config import base_config
from hjepa_jax.errors import InputError
from hjepa_jax.runs.scores import read_probe_json, write_probe_json
from hjepa_jax.training import sweep
from tests.conftest import REPOSITORY, make_tiny_config
from tests.test_cli import assert_refused, tiny_overrides

SWEPT = [
    *REPOSITORY.glob("experiments/ablations/*.py"),
    *REPOSITORY.glob("experiments/recipes/*.py"),
]
RATES = "--vary=optim.learning_rate=1e-3,0.01"


@pytest.fixture
def command(run_module, shapes_npz, tmp_path):
    """`command(*flags)` runs a sweep of a tiny config in tmp_path/sweep, in a process."""
    overrides = tiny_overrides(shapes_npz) | {"train.num_steps": 2, "eval.batch_size": 60}
    flags = [f"--config.{field}={value}" for field, value in overrides.items()]
    start = ["shapes_tiny", *flags, f"--workdir={tmp_path / 'sweep'}"]
    return lambda *more: run_module("hjepa_jax.sweep", *start, *more)


@pytest.mark.slow
def test_a_sweep_trains_and_compares_and_makes_nothing_twice(command, tmp_path):
    folder, seeds = tmp_path / "sweep", "--seeds=0,1"
    done = command(RATES, seeds)
    assert done.returncode == 0, done.stderr
    names = [f"learning_rate={rate},seed={seed}" for seed in (0, 1) for rate in (0.001, 0.01)]
    assert {path.name for path in folder.iterdir()} == {*names, "sweep.csv", "baselines.json"}
    rows = {name: read_probe_json(folder / name / "held_out.json") for name in names}
    for found in rows.values():
        assert {row["encoder"] for row in found} == {"target", "random_init", "pixels"}
        assert {(row["train_size"], row["test_size"]) for row in found} == {(192, 48)}, (
            "the 240 training images are split"
        )
        assert {row["pool"] for row in found} == {"concat"}
    scores = [
        100 * next(r["top1"] for r in rows[f"learning_rate=0.01,seed={seed}"]
                   if (r["protocol"], r["encoder"]) == ("knn", "target"))
        for seed in (0, 1)
    ]  # fmt: skip
    mean = f"{statistics.mean(scores):.1f} +- {statistics.stdev(scores):.1f}"
    table = done.stdout[
        done.stdout.index("k-NN, top-1 in percent on 48 held-out training images") :
    ]
    (line,) = (line for line in table.splitlines() if line.startswith("  learning_rate=0.01"))
    assert line.split("  ")[-3].strip().lstrip("*") == mean, "the trained encoder is first"
    with (folder / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [pathlib.Path(line["workdir"]).name for line in lines] == names
    assert float(lines[1]["knn_target"]) == pytest.approx(scores[0], abs=0.01)

    again = command(RATES, seeds)
    assert again.stdout.count("done already") == 4
    assert "compiling" not in again.stdout
    assert (
        again.stdout[again.stdout.index("linear,") :] == done.stdout[done.stdout.index("linear,") :]
    )
    # The probes of raw pixels take longest, so later sweeps read their scores from the file.
    kept = read_probe_json(folder / "baselines.json")
    marked = [row | {"top1": 0.125} if row["encoder"] == "pixels" else row for row in kept]
    write_probe_json(folder / "baselines.json", marked)
    (folder / names[-1] / "held_out.json").unlink()
    assert command(RATES, seeds).stdout.count("done already") == 3
    again = read_probe_json(folder / names[-1] / "held_out.json")
    assert {row["top1"] for row in again if row["encoder"] == "pixels"} == {0.125}
    assert [row for row in again if row["encoder"] != "pixels"] == [
        row for row in rows[names[-1]] if row["encoder"] != "pixels"
    ]
    listed = command(RATES, seeds, "--dry_run", "--config.loss.kind=mse").stdout.splitlines()
    assert [line.rpartition("  ")[2].strip() for line in listed] == ["holds another config"] * 4


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_made(command, tmp_path):
    done = command("--vary=train.init_from=nowhere,None")
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert lines[-1] == "error: 1 of 2 runs failed, see above: init_from=nowhere seed 0"
    assert "init_from=None" in (tmp_path / "sweep/sweep.csv").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vary=optim.lr=1,2"], "did you mean optim.learning_rate?"),
        (["--vary=model.depth=two"], "model.depth='two': must be a whole number"),
        (["--vary=model.depth=2,2"], "with different values"),
        (["--vary=seed=1,2"], "seeds are given by --seeds"),
        (["--vary=model.depth=1", "--vary=model.depth=2"], "--vary='model.depth': is given twice"),
        (["--seeds=0,0"], "must be different whole numbers"),
        (["--rows=no"], "--rows='no': must be some of"),
        (["--vary=mask.scale=(0.5,0.1),(0.1,0.2)"], "mask.scale=(0.5, 0.1)"),
        (["--num_fit=5"], "--num_fit=5: leaves no image of class"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_bad_sweep_is_refused_before_the_first_run(command, tmp_path, flags, words):
    assert_refused(command(*flags), words)
    assert not (tmp_path / "sweep").exists()


def test_rows_are_all_combinations_and_have_short_names():
    found = sweep.grid([("optim.kind", ["muon"]), ("loss.kind", ["mse", "cosine"]), ("seed", [1])])
    assert list(found) == [
        "optim.kind=muon,loss.kind=mse,seed=1",
        "optim.kind=muon,loss.kind=cosine,seed=1",
    ]
    assert found["optim.kind=muon,loss.kind=mse,seed=1"] == {
        "optim.kind": "muon",
        "loss.kind": "mse",
        "seed": 1,
    }
    assert sweep.grid([]) == {"": {}}


def test_a_row_may_start_from_an_earlier_one_of_its_seed(tmp_path):
    rows = {"first": {}, "second": {"train.init_from": "first", "mask.scale": (0.1, 0.2)}}
    runs = sweep.members(base_config(), rows, (3, 4), tmp_path)
    assert [run.workdir.name for run in runs] == [
        "first,seed=3", "second,seed=3", "first,seed=4", "second,seed=4",
    ]  # fmt: skip
    assert runs[3].config.train.init_from == str(runs[2].workdir)
    assert not runs[0].config.eval.probe_at_end, "a sweep must not use test images"
    with pytest.raises(InputError, match="would hold two runs: a/b, and a_b with seed 0"):
        sweep.members(base_config(), {"a/b": {}, "a_b": {}}, (0,), tmp_path)


def pretend(run: sweep.Member, step: int, score: float, **fields: Any) -> None:
    """Creates the directory of a finished run, with scores as from --num_fit=9."""
    (run.workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
    (run.workdir / "config.json").write_text(json.dumps(run.config.to_dict()))
    row = {
        "pool": "concat", "level": "all", "dim": 8, "data": "shapes, training images",
        "num_fit": 9, "num_val": run.config.eval.num_val, "test_size": 48, "top1": score,
        "chosen": {"val_top1": score}, **fields,
    }  # fmt: skip
    rows = [
        row | {"encoder": encoder, "protocol": protocol, "step": step * (encoder == "target")}
        for encoder in sweep.ENCODERS
        for protocol in sweep.PROTOCOLS
    ]
    write_probe_json(run.workdir / "held_out.json", rows)


def test_only_scores_of_the_newest_checkpoint_and_these_settings_count(tmp_path, monkeypatch):
    (run,) = sweep.members(make_tiny_config("shapes"), {"base": {}}, (0,), tmp_path)
    pretend(run, 6, 0.5)
    pretend(run, 6, 0.9, pool="summary")
    assert {row["top1"] for row in sweep.rows_of(run, 9).values()} == {0.5}
    assert not sweep.rows_of(run, None), "scores of another --num_fit"
    for field, value in (("num_val", 7), ("data", "npz:other")):
        other = copy.deepcopy(run.config).unlock()
        other.eval[field] = value
        assert not sweep.rows_of(dataclasses.replace(run, config=other), 9), field
    pretend(run, 8, 0.7)
    assert {row["top1"] for row in sweep.rows_of(run, 9).values()} == {0.7}, "a longer run"


@pytest.mark.parametrize("steps", [(6, 6), (6, 8)])
def test_runs_of_different_lengths_are_not_averaged(tmp_path, steps):
    """Seeds of one row with different lengths get separate lines, and a note says why."""
    runs = sweep.members(make_tiny_config("shapes"), {"base": {}}, (0, 1), tmp_path)
    for run, step in zip(runs, steps, strict=True):
        pretend(run, step, 0.5 + 0.1 * run.seed)
    table = sweep.format_sweep(runs, 9)
    if steps == (6, 6):
        assert "  base                             2  55.0 +- 7.1" in table
        assert "no mean" not in table
    else:
        assert "+- 7.1" not in table
        assert "base seed 1                      1         60.0" in table
        assert "no mean for base: the runs differ in step (6, 8)" in table
    assert max(map(len, table.splitlines())) <= 80


def test_runs_that_start_from_their_own_seed_of_a_row_have_a_mean(tmp_path):
    rows = {"first": {}, "second": {"train.init_from": "first"}}
    runs = sweep.members(make_tiny_config("shapes"), rows, (0, 1), tmp_path)
    for run in runs:
        pretend(run, 6, 0.5 + 0.1 * run.seed)
    table = sweep.format_sweep(runs, 9)
    assert "  second                           2  55.0 +- 7.1" in table
    assert "no mean" not in table


def test_only_differences_beyond_chance_are_marked():
    """For equal spreads and 4 degrees of freedom, the limit is 2.78 sqrt(2 / 3) = 2.27 points."""
    assert sweep._differs([53.0, 54.0, 55.0], [50.0, 51.0, 52.0])
    assert not sweep._differs([52.0, 53.0, 54.0], [50.0, 51.0, 52.0])
    assert not sweep._differs([90.0], [50.0, 51.0, 52.0]), "a single seed is never marked"


@pytest.mark.parametrize("path", SWEPT, ids=lambda path: path.stem)
def test_every_row_of_the_experiments_is_a_config_that_works(path, tmp_path):
    module = runpy.run_path(str(path))
    assert sweep.members(module["get_config"](), module["ROWS"], (0,), tmp_path)
