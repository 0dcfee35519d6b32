"""A run that begins with the parameters of another one, maybe at another resolution."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jaxtyping import Array

from hjepa_jax.config import build
from hjepa_jax.config.defaults import Config, encoder_size
from hjepa_jax.errors import InputError
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.models.positions import interpolate_positions
from hjepa_jax.runs.load import load_state, read_meta
from hjepa_jax.runs.run import Run
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.runtime.placement import Placement

FIELD = "train.init_from"
# Fields of `model` that may differ: how the networks are computed or trained, not what they are.
FREE = {"dtype", "drop_path", "projection", "projection_input", "remat", "target"}
# A head that training needs and features do not. One run may have it and the other not.
HEAD = "projection"


def check_source(config: Config) -> None:
    """Checks the run that `train.init_from` names, if it names one, before anything is written.

    The networks must be the same, parameter by parameter. Only tables of positions may be of
    another grid, and the projection head may differ: it then begins anew.

    Raises:
      InputError: when there is no such run or checkpoint, or its networks differ.
    """
    workdir = config.train.init_from
    if not workdir:
        return
    with _told_as_field(workdir):
        theirs = load_config(_path(workdir))
        read_meta(_path(workdir))
        there, here = _parameters(theirs), _parameters(config)
    ours = _networks(config)
    for name, value in _networks(theirs).items():
        if value != ours[name]:
            rule = f"has other networks: model.{name} is {value!r} there and {ours[name]!r} here"
            raise InputError(FIELD, workdir, rule)
    for path in sorted(there.keys() | here.keys()):
        shapes = there.get(path), here.get(path)
        if not (path.startswith(HEAD) or shapes[0] == shapes[1] or _is_grid(path, *shapes)):
            what = ", ".join(
                f"{shape if shape else 'absent'} {where}"
                for shape, where in zip(shapes, ("there", "here"), strict=True)
            )
            raise InputError(FIELD, workdir, f"has other networks: {path} is {what}")


def _path(workdir: str) -> pathlib.Path:
    try:
        return pathlib.Path(workdir).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise InputError(FIELD, workdir, str(error)) from error


def _parameters(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the online parameters by path, such as "predictor/mask_token"."""
    create = build.build_create_state(config, build.build_model(config), optax.identity())
    return _shapes(jax.eval_shape(create).params)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {
        "/".join(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _is_grid(path: str, there: tuple[int, ...] | None, here: tuple[int, ...] | None) -> bool:
    """Whether the shapes are those of tables of positions, [N, D], of two square grids."""
    if not there or not here or len(there) != 2 or len(here) != 2 or there[1] != here[1]:
        return False
    if not path.endswith("/embedding"):
        return False
    return all(math.isqrt(n) ** 2 == n for n in (there[0], here[0]))


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
        _, found, _ = load_state(_path(workdir))
    place, ours = run.placement, state.params
    theirs = _with_our_head(workdir, found.params, ours, place)
    params = jax.tree.map(_fit, theirs, ours)
    target_params = jax.tree.map(_fit, found.target_params, state.target_params)
    return dataclasses.replace(
        state,
        params=place.put(params, place.state(state.params)),
        target_params=place.put(target_params, place.state(state.target_params)),
    )


def _with_our_head(workdir: str, theirs: Any, ours: Any, place: Placement) -> Any:
    """The parameters of the other run, with the projection head of this one where it differs."""
    here = _shapes(ours.get(HEAD))
    if _shapes(theirs.get(HEAD)) == here:
        return theirs
    how = f"begins anew: {workdir} has none of this size" if here else f"of {workdir} is left out"
    print(f"{FIELD}: the {HEAD} head {how}", flush=True)
    kept = {name: tree for name, tree in theirs.items() if name != HEAD}
    return {**kept, HEAD: place.local(ours[HEAD])} if here else kept


def _fit(there: Array, here: Array) -> Array:
    """An array of the other run, in the shape that it has here."""
    return there if there.shape == here.shape else interpolate_positions(there, len(here))
