"""Loads encoders and states from the checkpoints of a work directory."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from hjepa_jax.config import Config, build
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.models.hjepa import HJEPA
from hjepa_jax.runs.checkpoint import Checkpoints
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.runtime.backend import initialise


def load_encoder(workdir: str | pathlib.Path, step: int | str | None = None) -> tuple[HJEPA, Any]:
    """Returns the model of a run and the parameters of its target encoder.

    `hjepa_jax.load` does the same and also prepares images.

    Args:
      workdir: the run's directory. Its data set is not needed.
      step: which checkpoint: "last", "best" (by k-NN) or a number; None for the newest.

    Raises:
      InputError: if the directory holds no run or no such checkpoint.
    """
    model, params, _ = load_target(pathlib.Path(workdir), "last" if step is None else step)
    return model, params


def load_target(workdir: pathlib.Path, step: int | str) -> tuple[HJEPA, Any, int]:
    """Returns the same as `load_encoder`, and the step of the checkpoint."""
    model, state = _load_fields(workdir, str(step), {"step", "target_params"})
    return model, state.target_params, int(state.step)


def load_state(workdir: pathlib.Path, which: str = "last") -> tuple[HJEPA, TrainState, TrainState]:
    """Returns the model of a run, its state at a checkpoint, and its state at step 0.

    `opt_state` and `rng` are None in both states: only training needs them.

    Args:
      workdir: the run's directory. Its data set is not needed.
      which: "last", "best" (by k-NN) or the step of a checkpoint.

    Raises:
      InputError: if the directory holds no run or no such checkpoint.
    """
    model, state = _load_fields(workdir, which, {"step", "params", "target_params"})
    initial = initialise(*_create_state(load_config(workdir), model))  # same program as in training
    return model, state, _only(initial, {"step", "params", "target_params"})


def _load_fields(workdir: pathlib.Path, which: str, wanted: set[str]) -> tuple[HJEPA, TrainState]:
    """Returns the model of a run and the `wanted` fields of its state; the others are None."""
    config = load_config(workdir)
    model = build.build_model(config)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        _only(jax.eval_shape(*_create_state(config, model)), wanted),
    )
    with Checkpoints(workdir, config=config) as checkpoints:
        return model, checkpoints.restore_state(template, checkpoints.find_step(which))


def _create_state(config: Config, model: HJEPA) -> tuple[Callable[..., TrainState], Any]:
    """Returns a function that makes the state at step 0, and its argument."""
    # The shapes do not depend on the schedules, so any number of images works.
    schedules = build.build_schedules(config, config.train.batch_size)
    return functools.partial(build.initial_state, config, model, schedules), schedules.numbers


def _only(state: TrainState, wanted: set[str]) -> TrainState:
    """Returns the state with None in all other fields."""
    others = {field.name for field in dataclasses.fields(state)} - wanted
    return dataclasses.replace(state, **dict.fromkeys(others))
