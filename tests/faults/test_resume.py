"""A run in two parts equals the run in one, wherever it stops, saves and logs."""

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
from tests.faults.test_kills import newest_checkpoint, state_and_lines

pytestmark = pytest.mark.slow

NUM_STEPS = 17  # beyond the 15 steps of an epoch

# Two programs that differ in everything that a step depends on. Each is compiled once.
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


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Arrays and log lines of the runs in one part, by program."""
    found = {}

    def whole_run(program: str, config):
        if program not in found:
            workdir = tmp_path_factory.mktemp("whole")
            train.train_and_evaluate(config, workdir)
            found[program] = state_and_lines(config, workdir)
        return found[program]

    return whole_run


@pytest.mark.parametrize("program", PROGRAMS)
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(save_every=st.sampled_from([2, 5]), stop=st.integers(1, NUM_STEPS - 4))
def test_a_run_in_two_parts_equals_the_run_in_one(
    tiny_config, tmp_path_factory, whole_runs, program, save_every, stop
):
    workdir: pathlib.Path = tmp_path_factory.mktemp("parts")
    config = tiny_config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict({**PROGRAMS[program], "train.num_steps": NUM_STEPS})
    config.train.checkpoint_every_steps = save_every
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchOrder, "batches", BatchOrder.batches)  # undone at the end
        processes.stop_in_step(stop)
        with pytest.raises(Interrupted):
            train.train_and_evaluate(config, workdir)
    assert stop <= newest_checkpoint(workdir) < NUM_STEPS
    train.train_and_evaluate(config, workdir)
    arrays, lines = state_and_lines(config, workdir)
    whole_arrays, whole_lines = whole_runs(program, config)
    jax.tree.map(np.testing.assert_array_equal, arrays, whole_arrays)
    assert lines == whole_lines


def test_a_run_may_move_between_one_device_and_four(tiny_config, tmp_path):
    """One device, four, one again: the same curve, up to float32 rounding."""
    tiny_config.log.every_steps = 1
    lines = {}
    for name, parts in {"one": [(1, None)], "moved": [(1, 2), (4, 4), (1, None)]}.items():
        for devices, stop_step in parts:
            tiny_config.parallel.cpu_devices = devices
            code = processes.finish(tiny_config, tmp_path / name, stop_step=stop_step)
            assert code == (143 if stop_step else 0), processes.printed(tmp_path / name)
        lines[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    assert [line["step"] for line in lines["moved"]] == [1, 2, 3, 4, 5, 6]
    for one, moved in zip(lines["one"], lines["moved"], strict=True):
        for metric, value in one.items():
            if not metric.startswith("perf/"):
                np.testing.assert_allclose(moved[metric], value, rtol=2e-3, err_msg=metric)

    tiny_config.parallel.cpu_devices = 3
    assert processes.finish(tiny_config, tmp_path / "three") == 2
    rule = "train.batch_size=16: must be a multiple of the number of devices, 3"
    assert rule in processes.printed(tmp_path / "three")
