"""Alarms: each thing is said once, and ends the run only where the user wants that."""

import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax import metrics
from hjepa_jax.alarms import Alarms
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.quality import collapse_verdict

RNG = np.random.default_rng(0)
HEALTHY = collapse_verdict(RNG.normal(size=(100, 16)))
NARROW = collapse_verdict(RNG.normal(size=(100, 1)) * RNG.normal(size=(1, 16)))
POINT = collapse_verdict(1 + 1e-4 * RNG.normal(size=(100, 16)))


def make_alarms(*, max_nonfinite_steps=1, on_collapse="warn"):
    said = []
    alarms = Alarms(
        max_nonfinite_steps=max_nonfinite_steps,
        on_collapse=on_collapse,
        say=said.append,
        newest_checkpoint=lambda: 30,
    )
    return alarms, said


def window_with(bad_steps):
    window = metrics.empty_window(
        metrics.make_averages(["grad_norm", "loss"]), batch_size=4, width=2
    )
    for step in bad_steps:
        scalars = {"loss": jnp.float32(1), "grad_norm": jnp.float32(np.inf)}
        window = metrics.update_window(
            window, scalars, jnp.ones((4, 2)), jnp.int32(step - 1), jnp.bool_(False)
        )
    return window


def test_a_step_left_out_is_reported_once_with_its_number_and_its_term():
    alarms, said = make_alarms()
    alarms.check_finite(window_with([]), 10)
    assert said == []
    for _ in range(2):
        alarms.check_finite(window_with([17]), 20)
    assert len(said) == 1
    assert "1 of 20 steps" in said[0]
    assert "step 17: grad_norm" in said[0]
    assert "loss," not in said[0]


def test_a_level_that_is_hardly_ever_predicted_is_said_once():
    alarms, said = make_alarms()
    for _ in range(2):
        alarms.check_targets(
            {"num_targets_level_0": 30.0, "num_targets_level_2": 0.02, "loss": 0.1}
        )
    assert len(said) == 1
    assert "level 2 has 0.02 targets per image" in said[0]


def test_too_many_steps_left_out_end_the_run():
    alarms, _ = make_alarms(max_nonfinite_steps=1)
    with pytest.raises(
        InputError, match=r"max_nonfinite_steps=1: .*2 of 40 .*checkpoint is step 30"
    ):
        alarms.check_finite(window_with([31, 32]), 40)


def test_collapse_and_recovery_are_reported_when_they_begin():
    alarms, said = make_alarms()
    for step, verdict in enumerate([HEALTHY, NARROW, NARROW, POINT, HEALTHY, HEALTHY]):
        alarms.check_spread(verdict, step)
    assert [line.split(";")[0] for line in said] == [
        "WARNING: target features at step 1: partial collapse",
        "WARNING: target features at step 3: collapse",
        "target features at step 4: healthy",
    ]


def test_collapse_may_end_the_run_or_be_ignored():
    alarms, _ = make_alarms(on_collapse="stop")
    alarms.check_spread(HEALTHY, 1)
    with pytest.raises(InputError, match=r"on_collapse='stop': .*partial collapse.*step 30"):
        alarms.check_spread(NARROW, 2)
    alarms, said = make_alarms(on_collapse="ignore")
    alarms.check_spread(POINT, 1)
    assert said == []
