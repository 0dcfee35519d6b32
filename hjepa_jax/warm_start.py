"""A run that begins with the parameters of another one, maybe at another resolution."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array

from hjepa_jax import checkpoint
from hjepa_jax.config import Config, encoder_size
from hjepa_jax.errors import InputError
from hjepa_jax.models.positions import interpolate_positions
from hjepa_jax.run import Run
from hjepa_jax.run_dir import load_config
from hjepa_jax.train_state import TrainState

FIELD = "train.init_from"
# Of the networks, what may differ: how they are computed or trained, not what they are.
FREE = {
    "dtype", "drop_path", "global_target", "level_depths", "remat", "target", "target_layers",
}  # fmt: skip


def check_source(config: Config) -> None:
    """Checks the run that `train.init_from` names, if it names one, before anything is written.

    Raises:
      InputError: when there is no such run or checkpoint, or its networks differ.
    """
    workdir = config.train.init_from
    if not workdir:
        return
    with _told_as_field(workdir):
        theirs = load_config(pathlib.Path(workdir))
        checkpoint.read_meta(pathlib.Path(workdir))
    ours = _networks(config)
    for name, there in _networks(theirs).items():
        here = ours[name]
        if there != here:
            rule = f"has other networks: model.{name} is {there!r} there and {here!r} here"
            raise InputError(FIELD, workdir, rule)


@contextlib.contextmanager
def _told_as_field(workdir: str) -> Iterator[None]:
    """What is wrong with the other run is wrong with `train.init_from`, not with the flags."""
    try:
        yield
    except InputError as error:
        which = f"its checkpoint {error.value} " if error.field == "--step" else ""
        raise InputError(FIELD, workdir, which + error.rule) from error


def _networks(config: Config) -> dict[str, Any]:
    """The fields that make the networks what they are."""
    sizes = dict(zip(("width", "depth", "num_heads"), encoder_size(config), strict=True))
    fields = {**config.model.to_dict(), **sizes}
    return {name: value for name, value in fields.items() if name not in FREE | {"name"}}


def start_from(workdir: str, run: Run, state: TrainState) -> TrainState:
    """The state at step 0 with parameters and EMA of the newest checkpoint of another run.

    The networks are the same (`check_source`); the grid of patches may differ. Learned positions
    are then interpolated, fixed ones are those of the new grid, and rotary ones need nothing.
    Optimizer, schedules, masks and data begin anew.

    Args:
      workdir: directory of the other run.
      run: the new run.
      state: its state at step 0.

    Raises:
      InputError: when that checkpoint is damaged.
    """
    with _told_as_field(workdir):
        _, found, _ = checkpoint.load_state(pathlib.Path(workdir))
    params, target_params = (
        jax.tree.map(_fit, theirs, ours)
        for theirs, ours in (
            (found.params, state.params),
            (found.target_params, state.target_params),
        )
    )
    place = run.placement
    return dataclasses.replace(
        state,
        params=place.put(params, place.state(state.params)),
        target_params=place.put(target_params, place.state(state.target_params)),
    )


def _fit(there: Array, here: Array) -> Array:
    """An array of the other run, in the shape that it has here."""
    return there if there.shape == here.shape else interpolate_positions(there, len(here))
