"""Probes on held-out training images: the split of the sweeps, all encoders, no test images."""

import functools

import numpy as np
import pytest

from hjepa_jax.data.base import Split
from hjepa_jax.data.npz import save_npz
from hjepa_jax.evaluation.held_out import fitted_and_scored, held_out_rows
from hjepa_jax.runs.scores import read_probe_json
from tests.test_embed import make_run

NUM_FIT = 120


@pytest.mark.slow
def test_the_command_scores_all_encoders_on_the_rows_of_the_sweeps(tmp_path, run_module):
    """The training images show their class. The test images show a different class."""
    labels = np.arange(240, dtype=np.int32) % 4
    images = np.random.default_rng(0).integers(0, 30, (240, 8, 8, 3), np.uint8)
    images += (60 * labels).astype(np.uint8)[:, None, None, None]
    test = Split(images[:40], (labels[:40] + 1) % 4)
    save_npz(tmp_path / "data.npz", Split(images, labels), test)
    make_run(tmp_path / "run", f"npz:{tmp_path / 'data.npz'}", **{"eval.num_val": 40})
    command = functools.partial(run_module, "experiments.held_out", f"--num_fit={NUM_FIT}")
    done = command(str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "random-init" in done.stdout
    rows = read_probe_json(tmp_path / "run" / "held_out.json")
    assert {row["encoder"] for row in rows} == {"target", "random_init", "pixels"}
    assert {row["protocol"] for row in rows} == {"linear", "knn"}
    fit, scored = fitted_and_scored(240, 40, NUM_FIT)
    assert (len(fit), len(scored), set(fit) & set(scored)) == (NUM_FIT, 40, set())
    assert {(row["train_size"], row["test_size"]) for row in rows} == {(NUM_FIT, 40)}
    (pixels,) = (r["top1"] for r in rows if (r["encoder"], r["protocol"]) == ("pixels", "linear"))
    assert pixels > 0.9, "with the labels of the test images, this would be 0"
    refused = command(str(tmp_path))
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)


@pytest.mark.usefixtures("short_probes")
def test_raw_pixels_are_those_of_the_whole_rectangle(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (60, 16, 32, 3), np.uint8)
    whole = Split(images, np.arange(60, dtype=np.int32) % 2)
    save_npz(tmp_path / "data.npz", whole, whole)
    fields = {"data.image_size": (16, 32), "eval.num_val": 10}
    make_run(tmp_path / "run", f"npz:{tmp_path / 'data.npz'}", **fields)
    rows = held_out_rows(tmp_path / "run", None)
    assert {row["dim"] for row in rows if row["encoder"] == "pixels"} == {16 * 32 * 3}
