"""Encoders and states from the checkpoints of a work directory."""

import dataclasses
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


def read_meta(workdir: pathlib.Path) -> dict[str, Any]:
    """What the newest checkpoint says of itself: commit, versions, scores and more.

    Raises:
      InputError: when there is none that can be read.
    """
    checkpoints = Checkpoints(workdir, config=load_config(workdir))
    try:
        return checkpoints.meta(None)
    finally:
        checkpoints.close()


def load_encoder(workdir: str | pathlib.Path, step: int | str | None = None) -> tuple[HJEPA, Any]:
    """The model of a run and the parameters of its target encoder; nothing else is read.

    `hjepa_jax.load` does the same and also prepares images.

    Args:
      workdir: the run's directory. The data set it was trained on is not needed.
      step: which checkpoint, "last", "best" (by k-NN) or a number; None for the newest.

    Raises:
      InputError: when the directory holds no run or no such checkpoint.
    """
    which = "last" if step is None else str(step)
    model, state = _load_fields(pathlib.Path(workdir), which, {"target_params"})
    return model, state.target_params


def load_state(workdir: pathlib.Path, which: str = "last") -> tuple[HJEPA, TrainState, TrainState]:
    """The model of a run, its state at a checkpoint, and its state at step 0.

    The state of the optimizer and the key are None in both: only training needs them.

    Args:
      workdir: the run's directory. The data set it was trained on is not needed.
      which: "last", "best" (by k-NN) or the step of a checkpoint.

    Raises:
      InputError: when the directory holds no run or no such checkpoint.
    """
    model, state = _load_fields(workdir, which, {"step", "params", "target_params"})
    create = _create_state(load_config(workdir), model)
    return model, state, initialise(lambda: _only(create(), {"step", "params", "target_params"}))


def _load_fields(workdir: pathlib.Path, which: str, wanted: set[str]) -> tuple[HJEPA, TrainState]:
    """The model of a run and some fields of its state at a checkpoint; the others are None."""
    config = load_config(workdir)
    model = build.build_model(config)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        _only(jax.eval_shape(_create_state(config, model)), wanted),
    )
    checkpoints = Checkpoints(workdir, config=config)
    try:
        return model, checkpoints.restore_state(template, checkpoints.find_step(which))
    finally:
        checkpoints.close()


def _create_state(config: Config, model: HJEPA) -> Callable[[], TrainState]:
    # Schedules decide no shape, so any length will do.
    tx = build.build_optimizer(config, build.build_schedules(config, config.train.batch_size))
    return build.build_create_state(config, model, tx)


def _only(state: TrainState, wanted: set[str]) -> TrainState:
    """The state with None in place of all other fields."""
    others = {field.name for field in dataclasses.fields(state)} - wanted
    return dataclasses.replace(state, **dict.fromkeys(others))
