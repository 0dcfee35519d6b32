"""The sweep runner: rows that say what they are, once each, and never a test image."""

import csv
import pathlib
import sys

import numpy as np
import pytest

from experiments import sweep
from tests.test_cli import tiny_overrides


@pytest.fixture
def tiny_sweep(shapes_npz, tmp_path, monkeypatch):
    shared = tiny_overrides(shapes_npz) | {"mask.scale": (0.25, 0.25), "eval.every_epochs": 0.0}
    path = tmp_path / "tiny.py"
    path.write_text(
        f"CONFIG, SHARED, SEEDS, NUM_FIT = 'shapes_tiny', {shared}, (0,), 60\n"
        "ROWS = {'broken': {'loss.kind': 'hope'}, 'mse': {'loss.kind': 'mse'}}\n"
    )
    monkeypatch.chdir(tmp_path)
    return path


def read(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_row_is_made_once_and_says_what_was_changed(tiny_sweep, monkeypatch):
    fitted, scored, probe = [], [], sweep.linear_probe

    def spied(x, y, test_x, test_y, **kwargs):
        fitted.append(y)
        scored.append(test_y.tolist())
        return probe(x, y, test_x, test_y, **kwargs)

    monkeypatch.setattr(sweep, "linear_probe", spied)
    results = tiny_sweep.with_suffix(".csv")
    found = sweep.read_sweep(tiny_sweep)
    sweep.make_row(found, "mse", 0, {}, results)
    (row,) = read(results)
    assert list(row) == list(sweep.COLUMNS)
    expected = {"row": "mse", "seed": "0", "config": "shapes_tiny", "num_fit": "60"}
    assert row | expected == row
    assert "loss.kind=mse" in row["overrides"]
    assert "model.width=16" in row["overrides"], "what all rows share is part of each"
    assert 0 <= float(row["linear_level_0"]) <= 100
    assert [len(y) for y in fitted] == [60, 60]
    every = np.asarray(np.load(found["SHARED"]["data.source"].removeprefix("npz:"))["train_labels"])
    config = sweep.row_config(found, found["SHARED"], 0)
    held_out = every[sweep.hold_out(len(every), num_val=config.eval.num_val)[1]]
    assert scored == [held_out.tolist()] * 2, "no test image"
    assert not np.array_equal(np.sort(fitted[0]), np.sort(every[:60])), "drawn from all images"

    sweep.make_row(found, "mse", 0, {}, results)
    assert len(read(results)) == 1
    sweep.make_row(found, "mse", 0, {"optim.learning_rate": 0.5}, results)
    found["SHARED"]["optim.learning_rate"] = 0.25
    sweep.make_row(found, "mse", 0, {}, results)
    assert [row["overrides"].split("=")[-1] for row in read(results)] == ["mse", "0.5", "mse"]


@pytest.mark.slow
def test_a_row_may_start_from_another(tiny_sweep):
    """One that then learns nothing scores what the other scores."""
    found, results = sweep.read_sweep(tiny_sweep), tiny_sweep.with_suffix(".csv")
    still = {
        "optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.num_steps": 1,
        "optim.ema_momentum": (1.0, 1.0, "constant"),
    }  # fmt: skip
    found["ROWS"] = {
        "first": {"optim.learning_rate": 0.3},
        "scratch": still,
        "second": {**still, "train.init_from": "first"},
        "third": {**still, "train.init_from": "second"},
    }
    for name in ("third", "second", "first", "scratch"):
        sweep.make_row(found, name, 0, {}, results)
    third, second, first, scratch = read(results)
    assert second["overrides"].endswith("train.init_from=first (optim.learning_rate=0.3)")
    assert second["effective_rank"] == first["effective_rank"] != scratch["effective_rank"]
    assert third["linear"] == second["linear"] == first["linear"]


def test_results_of_other_columns_are_refused(tiny_sweep):
    results = tiny_sweep.with_suffix(".csv")
    results.write_text("row,seed\nmse,0\n")
    with pytest.raises(ValueError, match=r"tiny\.csv: has the columns \['row', 'seed'\]"):
        sweep.make_row(sweep.read_sweep(tiny_sweep), "mse", 0, {}, results)


@pytest.mark.slow
def test_a_row_that_fails_is_named_and_the_others_are_made(tiny_sweep, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [sweep.__file__, str(tiny_sweep)])
    assert sweep.main() == 1
    assert capfd.readouterr().err.splitlines()[-1] == "failed: broken 0"
    assert [row["row"] for row in read(tiny_sweep.with_suffix(".csv"))] == ["mse"]


def test_an_unknown_row_is_refused(tiny_sweep, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [sweep.__file__, str(tiny_sweep), "--row=no"])
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    assert stop.value.code == 2
    assert "must be one of broken, mse" in capsys.readouterr().err
