"""Starts a run with the parameters of another run, which may have another resolution."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import optax
from flax import traverse_util

from hjepa_jax.config import build
from hjepa_jax.config.defaults import Config, encoder_size
from hjepa_jax.config.sizes import grid_of
from hjepa_jax.errors import InputError
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.models.positions import interpolate_positions
from hjepa_jax.runs.checkpoint_meta import read_newest_meta
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.run import Run
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.runtime import cluster
from hjepa_jax.runtime.paths import local_path
from hjepa_jax.runtime.placement import Placement

FIELD = "train.init_from"
# Fields of `model` that may differ: they change how the networks are computed or trained.
FREE = {"dtype", "drop_path", "projection", "projection_input", "remat", "target"}
# The projection head. It may differ, or be missing in one run, because features do not need it.
HEAD = "projection"
# End of the paths of the learned position tables, [N, D]. Their grids may differ.
POSITIONS = "/embedding"


def check_source(config: Config) -> None:
    """Checks the run that `train.init_from` names, if any, before anything is written.

    All parameters must have the same shapes, with two exceptions. Position tables may belong to
    another grid. The projection head may differ; it is then initialised from scratch.

    Raises:
      InputError: if there is no such run or checkpoint, or its networks differ.
    """
    workdir = config.train.init_from
    if not workdir:
        return
    folder = local_path(FIELD, workdir)
    with _errors_of_the_field(workdir):
        theirs = load_config(folder)
        read_newest_meta(folder)
        there, here = _parameters(theirs), _parameters(config)
    ours = _networks(config)
    for name, value in _networks(theirs).items():
        if value != ours[name]:
            rule = f"has other networks: model.{name} is {value!r} there and {ours[name]!r} here"
            raise InputError(FIELD, workdir, rule)
    for path in sorted(there.keys() | here.keys()):
        shapes = there.get(path), here.get(path)
        # Another grid has another number of positions, of the same width.
        is_free = path.startswith(HEAD)
        if path.endswith(POSITIONS) and all(shapes):
            is_free = len({shape[1:] for shape in shapes if shape}) == 1
        if not (is_free or shapes[0] == shapes[1]):
            what = ", ".join(
                f"{shape if shape else 'absent'} {where}"
                for shape, where in zip(shapes, ("there", "here"), strict=True)
            )
            raise InputError(FIELD, workdir, f"has other networks: {path} is {what}")


def _parameters(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the online parameters by path, such as "predictor/mask_token"."""
    create = build.build_create_state(config, build.build_model(config), optax.identity())
    return _shapes(jax.eval_shape(create).params)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    flat: dict[str, Any] = traverse_util.flatten_dict(params or {}, sep="/")
    return {path: x.shape for path, x in flat.items()}


@contextlib.contextmanager
def _errors_of_the_field(workdir: str) -> Iterator[None]:
    """Reports errors of the other run as errors of `train.init_from`, not of the flags."""
    try:
        yield
    except InputError as error:
        which = f"its checkpoint {error.value} " if error.field == "--step" else ""
        raise InputError(FIELD, workdir, which + error.rule) from error


def _networks(config: Config) -> dict[str, Any]:
    """Returns the fields that define the networks."""
    sizes = dict(zip(("width", "depth", "num_heads"), encoder_size(config), strict=True))
    fields = {**config.model.to_dict(), **sizes}
    return {name: value for name, value in fields.items() if name not in FREE | {"name"}}


def start_from(workdir: str, run: Run, state: TrainState) -> TrainState:
    """Returns `state` with the parameters and the EMA of the newest checkpoint of another run.

    The networks are the same (see `check_source`), but the patch grid may differ. In that case
    learned positions are interpolated; fixed and rotary positions are those of the new grid.
    Optimizer, schedules, masks and data order start from step 0.

    Args:
      workdir: directory of the other run.
      run: the new run.
      state: its state at step 0.

    Raises:
      InputError: if that checkpoint is damaged.
    """
    folder = local_path(FIELD, workdir)
    with _errors_of_the_field(workdir):
        _, found, _ = load_state(folder)
        grids = grid_of(load_config(folder)), grid_of(run.config)
    if cluster.is_first():
        print(f"{FIELD}: starting from {workdir}, step {int(found.step)}", flush=True)
    place, ours = run.placement, state.params
    theirs = _with_our_head(workdir, found.params, ours, place)
    params, target_params = on_grid(theirs, *grids), on_grid(found.target_params, *grids)
    return dataclasses.replace(
        state,
        params=place.put(params, place.state(state.params)),
        target_params=place.put(target_params, place.state(state.target_params)),
    )


def _with_our_head(workdir: str, theirs: Any, ours: Any, place: Placement) -> Any:
    """Returns the parameters of the other run; a head of other shapes is replaced by ours."""
    here = _shapes(ours.get(HEAD))
    if _shapes(theirs.get(HEAD)) == here:
        return theirs
    how = f"begins anew: {workdir} has none of this size" if here else f"of {workdir} is left out"
    print(f"{FIELD}: the {HEAD} head {how}", flush=True)
    kept = {name: tree for name, tree in theirs.items() if name != HEAD}
    return {**kept, HEAD: place.local(ours[HEAD])} if here else kept


def on_grid(params: Any, there: tuple[int, int], here: tuple[int, int]) -> Any:
    """Returns parameters whose learned positions are interpolated from one grid to another."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    if there != here:
        flat |= {
            path: interpolate_positions(table, there, here)
            for path, table in flat.items()
            if path.endswith(POSITIONS)
        }
    return traverse_util.unflatten_dict(flat, sep="/")
