"""A resumed run equals an uninterrupted run, at any step where it stops, saves or logs."""

import pathlib

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hjepa_jax.data.order import BatchOrder
from hjepa_jax.errors import Interrupted
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.training import train
from tests import processes
from tests.conftest import make_tiny_config
from tests.faults.test_kills import newest_checkpoint, state_and_lines

pytestmark = pytest.mark.slow

NUM_STEPS = 17  # more than the 15 steps of an epoch

# Two programs that differ in every setting a step depends on. Each is compiled once.
PROGRAMS = {
    "one_part": {
        "optim.accumulation_steps": 1,
        "train.steps_per_call": 4,
        "data.grayscale": 0.3,
        "mask.align_level": 1,
        "loss.kind": "cosine",
        "optim.ema_momentum": (0.9, 1.0, "cosine"),
        "log.every_steps": 3,
    },
    "two_parts": {
        "optim.accumulation_steps": 2,
        "train.steps_per_call": 1,
        "data.horizontal_flip": 0.0,
        "mask.align_level": 0,
        "loss.kind": "smooth_l1",
        "optim.ema_momentum": (0.98, 0.98, "constant"),
        "log.every_steps": 1,
    },
}


@pytest.fixture(scope="module", params=PROGRAMS)
def whole(request, shapes_npz, tmp_path_factory):
    """The config of a program, and the arrays and log lines of its uninterrupted run."""
    config = make_tiny_config(shapes_npz)
    config.update_from_flattened_dict({**PROGRAMS[request.param], "train.num_steps": NUM_STEPS})
    workdir = tmp_path_factory.mktemp("whole")
    train.train_and_evaluate(config, workdir)
    return config, *state_and_lines(config, workdir)


def train_until(config, workdir: pathlib.Path, stop: int) -> None:
    """Trains until a real signal arrives in step `stop`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchOrder, "batches", BatchOrder.batches)  # restored at the end
        processes.stop_in_step(stop)
        with pytest.raises(Interrupted):
            train.train_and_evaluate(config, workdir)


@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(save_every=st.sampled_from([2, 5]), stop=st.integers(1, NUM_STEPS - 4))
def test_a_run_in_two_parts_equals_the_run_in_one(tmp_path_factory, whole, save_every, stop):
    workdir: pathlib.Path = tmp_path_factory.mktemp("parts")
    config, whole_arrays, whole_lines = whole
    config.train.checkpoint_every_steps = save_every
    train_until(config, workdir, stop)
    assert stop <= newest_checkpoint(workdir) < NUM_STEPS
    train.train_and_evaluate(config, workdir)
    arrays, lines = state_and_lines(config, workdir)
    jax.tree.map(np.testing.assert_array_equal, arrays, whole_arrays)
    assert lines == whole_lines


def test_a_run_may_move_between_one_device_and_four(tiny_config, tmp_path):
    """One device, then four, then one again: the curve agrees up to float32 rounding."""
    tiny_config.log.every_steps = 1
    train.train_and_evaluate(tiny_config, tmp_path / "one")
    train_until(tiny_config, tmp_path / "moved", 2)
    tiny_config.parallel.cpu_devices = 4
    code = processes.finish(tiny_config, tmp_path / "moved", stop_step=4)
    assert code == 143, processes.printed(tmp_path / "moved")
    tiny_config.parallel.cpu_devices = 1
    train.train_and_evaluate(tiny_config, tmp_path / "moved")
    one, moved = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "moved"))
    assert [line["step"] for line in moved] == [1, 2, 3, 4, 5, 6]
    for before, after in zip(one, moved, strict=True):
        for metric in (name for name in before if not name.startswith("perf/")):
            np.testing.assert_allclose(after[metric], before[metric], rtol=2e-3, err_msg=metric)
