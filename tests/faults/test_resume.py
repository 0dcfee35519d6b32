"""N steps in one go and in two parts are the same run, for every setting and any place."""

import pathlib

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hjepa_jax import train
from hjepa_jax.data.pipeline import BatchOrder
from hjepa_jax.logging import read_metrics
from tests import processes
from tests.faults.test_kills import newest_checkpoint, state_and_lines

pytestmark = pytest.mark.slow

NUM_STEPS = 17  # beyond the 15 steps of an epoch

SETTINGS = st.fixed_dictionaries(
    {
        "train.steps_per_call": st.sampled_from([1, 3, 4]),
        "train.checkpoint_every_steps": st.sampled_from([2, 5]),
        "log.every_steps": st.sampled_from([1, 2, 3]),
        "data.grayscale": st.sampled_from([0.0, 0.3]),
        "data.horizontal_flip": st.sampled_from([0.0, 0.5]),
        "mask.align_level": st.sampled_from([0, 1]),
        "loss.kind": st.sampled_from(["smooth_l1", "cosine"]),
        "optim.ema_momentum": st.sampled_from([(0.9, 1.0, "cosine"), (0.98, 0.98, "constant")]),
    }
)


@pytest.mark.parametrize("accumulation_steps", [1, 2])  # two tests: one for each worker
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(overrides=SETTINGS, stop=st.integers(1, NUM_STEPS - 4))
def test_a_run_in_two_parts_is_the_run_in_one(
    tiny_config, tmp_path_factory, accumulation_steps, overrides, stop
):
    workdir: pathlib.Path = tmp_path_factory.mktemp("resume")
    config = tiny_config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict({**overrides, "train.num_steps": NUM_STEPS})
    config.optim.accumulation_steps = accumulation_steps
    train.train_and_evaluate(config, workdir / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchOrder, "batches", BatchOrder.batches)  # undone at the end
        processes.stop_in_step(stop)
        with pytest.raises(train.Interrupted):
            train.train_and_evaluate(config, workdir / "parts")
    assert stop <= newest_checkpoint(workdir / "parts") < NUM_STEPS
    train.train_and_evaluate(config, workdir / "parts")
    (whole_arrays, whole_lines), (arrays, lines) = (
        state_and_lines(config, workdir / name) for name in ("whole", "parts")
    )
    jax.tree.map(np.testing.assert_array_equal, arrays, whole_arrays)
    assert lines == whole_lines


def test_a_run_may_move_between_one_device_and_four(tiny_config, tmp_path):
    """One device, four, one again: the curve of one device throughout, to float32 rounding."""
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
