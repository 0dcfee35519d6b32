"""Probes on held-out training images: same split as the sweeps, all encoders, no test image."""

import functools
import pathlib

import numpy as np
import pytest

from experiments import held_out, sweep
from hjepa_jax.data.base import Split
from hjepa_jax.data.npz import save_npz
from hjepa_jax.runs.scores import read_probe_json
from tests.test_embed import make_run

NUM_FIT = 120


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run on images that show their class, with test images that show another."""
    folder = tmp_path_factory.mktemp("held_out")
    rng = np.random.default_rng(0)
    labels = np.arange(240, dtype=np.int32) % 4
    images = (
        rng.integers(0, 30, (240, 8, 8, 3), np.uint8)
        + (60 * labels).astype(np.uint8)[:, None, None, None]
    )
    test = Split(images[:40], (labels[:40] + 1) % 4)
    save_npz(folder / "data.npz", Split(images, labels), test)
    make_run(folder / "run", f"npz:{folder / 'data.npz'}", **{"eval.num_val": 40})
    return folder / "run"


def test_all_encoders_are_scored_on_the_rows_of_the_sweeps(workdir):
    rows = held_out.held_out_rows(workdir, NUM_FIT)
    assert {row["encoder"] for row in rows} == {"target", "random_init", "pixels"}
    assert {row["protocol"] for row in rows} == {"linear", "knn"}
    fit, scored = sweep.fitted_and_scored(240, 40, NUM_FIT)
    assert (len(fit), len(scored), set(fit) & set(scored)) == (NUM_FIT, 40, set())
    assert {(row["train_size"], row["test_size"]) for row in rows} == {(NUM_FIT, 40)}
    (pixels,) = (r["top1"] for r in rows if (r["encoder"], r["protocol"]) == ("pixels", "linear"))
    assert pixels > 0.9, "the labels of the test images would make it 0"


def test_the_command_writes_rows_and_refuses_other_folders(workdir, tmp_path, run_module):
    command = functools.partial(run_module, "experiments.held_out", f"--num_fit={NUM_FIT}")
    done = command(str(workdir))
    assert done.returncode == 0, done.stderr
    assert "random-init" in done.stdout
    assert len(read_probe_json(workdir / "held_out.json")) > 6
    refused = command(str(tmp_path))
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
