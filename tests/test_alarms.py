"""Alarms: each problem is reported once, and ends the run only if the config says so."""

import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.quality import Verdict, collapse_verdict
from hjepa_jax.method.window import empty_window, make_averages, update_window
from hjepa_jax.training.alarms import Alarms

RNG = np.random.default_rng(0)
HEALTHY = collapse_verdict(RNG.normal(size=(100, 16)))
NARROW = collapse_verdict(RNG.normal(size=(100, 1)) * RNG.normal(size=(1, 16)))
POINT = collapse_verdict(1 + 1e-4 * RNG.normal(size=(100, 16)))


def make_alarms(*, max_nonfinite_steps=1, on_collapse="warn", batch_size=512):
    said, limits = [], {"max_nonfinite_steps": max_nonfinite_steps, "on_collapse": on_collapse}
    where = {"say": said.append, "newest_checkpoint": lambda: 30, "batch_size": batch_size}
    return Alarms(**limits, **where), said


def window_with(bad_steps):
    window = empty_window(make_averages(["grad_norm", "loss"]), batch_size=4, width=2)
    for step in bad_steps:
        scalars = {"loss": jnp.float32(1), "grad_norm": jnp.float32(np.inf)}
        end = jnp.int32(step - 1), jnp.bool_(False)
        window = update_window(window, scalars, jnp.ones((4, 2)), *end)
    return window


def test_a_skipped_step_is_reported_once_with_its_number_and_term():
    alarms, said = make_alarms()
    alarms.check_finite(window_with([]), 10)
    assert said == []
    for _ in range(2):
        alarms.check_finite(window_with([17]), 20)
    assert len(said) == 1
    assert "1 of 20 steps" in said[0]
    assert "step 17: grad_norm" in said[0]
    assert "loss," not in said[0]


def test_a_level_with_few_targets_is_reported_once():
    alarms, said = make_alarms()
    for _ in range(2):
        found = {"num_targets_level_0": 30.0, "num_targets_level_2": 0.02, "loss": 0.1}
        alarms.check_targets(found)
    assert len(said) == 1
    assert "level 2 has 0.02 targets per image" in said[0]


def test_too_many_skipped_steps_end_the_run():
    alarms, _ = make_alarms(max_nonfinite_steps=1)
    rule = r"max_nonfinite_steps=1: .*2 of 40 .*checkpoint is step 30"
    with pytest.raises(InputError, match=rule):
        alarms.check_finite(window_with([31, 32]), 40)


def verdict_of(rank, std, max_rank=192):
    """Returns a verdict with these numbers. The alarms do not read its label."""
    return Verdict("healthy", std, rank, max_rank)


def test_collapse_and_recovery_are_reported_when_they_have_lasted():
    alarms, said = make_alarms()
    sequence = [HEALTHY, *[NARROW] * 2, HEALTHY, *[NARROW] * 4, *[POINT] * 2, HEALTHY, HEALTHY]
    for step, verdict in enumerate(sequence):
        alarms.check_spread(verdict, step)
    assert [line.split(";")[0] for line in said] == [
        "WARNING: target features at step 6: partial collapse",
        "WARNING: target features at step 8: collapse",
        "target features at step 10: healthy",
    ]
    assert said[0].endswith("for 3 lines of the log")


def test_the_low_rank_of_an_untrained_network_is_not_a_collapse():
    """Ranks of the first lines of experiments/m1_max_quick_val. 10 % of 192 is 19.2."""
    alarms, said = make_alarms(on_collapse="stop")
    for step, rank in enumerate([19.6, 18.8, 18.9, 18.7, 18.6, 18.8, 18.9, 19.4]):
        alarms.check_spread(verdict_of(rank, 0.63), 10 * step + 10)
    assert said == []
    for step in (90, 100):
        alarms.check_spread(verdict_of(9.7, 0.63), step)
    with pytest.raises(InputError, match=r"rank 9.7 of 192 .*at least 9.8; untrained: 19.6"):
        alarms.check_spread(verdict_of(9.7, 0.63), 110)


@pytest.mark.parametrize("verdict", [NARROW, POINT, verdict_of(0.0, 0.0), verdict_of(190.0, 1e-7)])
def test_features_that_are_constant_from_the_start_are_a_collapse(verdict):
    alarms, said = make_alarms()
    for step in range(5):
        alarms.check_spread(verdict, step)
    assert len(said) == 1
    assert said[0].startswith("WARNING: target features at step 2: ")


def test_the_low_spread_of_an_untrained_network_is_not_a_collapse():
    alarms, said = make_alarms()
    for step, std in enumerate([0.006, 0.004, 0.005, 0.0035, 0.008]):
        alarms.check_spread(verdict_of(90.0, std), step)
    assert said == []
    for step in range(3):
        alarms.check_spread(verdict_of(90.0, 0.0029), step)
    assert "collapse; effective rank 90.0" in said[0]


def test_a_resumed_run_remembers_its_untrained_network():
    """Its rank is the largest one up to the first line with a full window of images."""
    lines = [
        {"step": 2, "train/loss": 1.0},
        {"step": 4, "train/effective_rank": 12.0, "train/relative_std": 0.5},
        {"step": 8, "train/effective_rank": 20.0, "train/relative_std": 0.4},
        {"step": 10, "train/effective_rank": 18.0, "train/relative_std": 0.4},
        {"step": 12, "train/effective_rank": 90.0, "train/relative_std": 0.9},
    ]
    alarms, said = make_alarms(batch_size=52)  # 10 steps are more than 512 images
    alarms.remember(lines)
    for step in range(14, 20):
        alarms.check_spread(verdict_of(10.1, 0.6), step)
    assert said == []
    for step in range(20, 23):
        alarms.check_spread(verdict_of(9.9, 0.6), step)
    assert "(healthy: at least 10.0; untrained: 20.0)" in said[0]


def test_collapse_may_end_the_run_or_be_ignored():
    alarms, _ = make_alarms(on_collapse="stop")
    for step, verdict in enumerate([HEALTHY, NARROW, NARROW]):
        alarms.check_spread(verdict, step)
    with pytest.raises(InputError, match=r"on_collapse='stop': .*partial collapse.*step 30"):
        alarms.check_spread(NARROW, 3)
    alarms, said = make_alarms(on_collapse="ignore")
    for step in range(4):
        alarms.check_spread(POINT, step)
    assert said == []
