"""Shares programs between runs: a test process traces and compiles each program once.

Without this, every run traces and compiles its step, its initial state and its features again. This
takes several CPU seconds. Here, the functions that build them return their earlier result if the
config is the same. Tests of building itself use the fixture `own_programs`.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hjepa_jax.config import build
from hjepa_jax.evaluation import linear, protocols
from hjepa_jax.reporting import look, showcase, snapshot
from hjepa_jax.runs import run
from hjepa_jax.training import train

# Fields that say where images come from. The key contains the facts of the images instead.
OF_THE_SOURCE = {"data.source", "data.dir", "data.num_workers", "data.max_labelled"}
# Fields that do not change any program of a run. All other fields may.
NOT_OF_A_RUN = OF_THE_SOURCE | {
    "log", "eval", "train.checkpoint_every_epochs", "train.checkpoint_every_steps",
    "train.keep_checkpoints", "train.max_nonfinite_steps", "train.on_collapse", "train.init_from",
}  # fmt: skip
# Fields that do not change programs of features or pictures. Their key contains the model itself.
NOT_OF_FEATURES = OF_THE_SOURCE | {"log", "eval", "train", "optim", "loss", "seed"}


def key_of(config: Any, without: set[str]) -> str:
    """Returns the fields of a config as text, except the groups or fields in `without`."""
    fields = {
        f"{group}.{name}": value
        for group, values in config.to_dict().items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    kept = {k: v for k, v in fields.items() if not {k, k.partition(".")[0]} & without}
    return json.dumps([kept, jax.default_backend(), jax.device_count()], sort_keys=True)


class Lowered:
    """A lowered program that is compiled at most once."""

    def __init__(self, lowered: Any):
        self._lowered, self._compiled = lowered, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)

    def compile(self) -> Any:
        if self._compiled is None:
            self._compiled = self._lowered.compile()
        return self._compiled


def share(patch: pytest.MonkeyPatch) -> None:
    """Patches the functions that build runs: the same config gives the same programs."""
    patch.setattr(train, "build_run", sharing_runs(run.build_run))
    patch.setattr(build, "build_embed_fn", sharing_functions(build.build_embed_fn))
    shared = sharing_functions(snapshot.build_snapshot_fn)
    for module in (snapshot, look, showcase):  # the last two import the function by name
        patch.setattr(module, "build_snapshot_fn", shared)


def shorten_probes(patch: pytest.MonkeyPatch) -> None:
    """Linear probes try few penalties in few iterations: same rows, but other scores."""

    def short(*arrays: Any, l2_grid: Any, **options: Any) -> Any:
        return linear.linear_probe(*arrays, l2_grid=l2_grid[::4], num_iterations=10, **options)

    patch.setattr(protocols, "linear_probe", short)


def sharing_runs(build_run: Callable[..., run.Run]) -> Callable[..., run.Run]:
    runs: dict[Any, run.Run] = {}

    def shared(config: Any, source: Any) -> run.Run:
        key = (key_of(config, NOT_OF_A_RUN), source.info, source.num_images, source.records is None)
        if key not in runs:
            # A copy, because a test may change its config before the run reads it in `lower`.
            built = build_run(config.copy_and_resolve_references(), source)
            shared_parts = {
                "lower": sharing_lowered(built.lower),
                "create": sharing_state(built.create),
            }
            runs[key] = dataclasses.replace(built, **shared_parts)
        return dataclasses.replace(runs[key], config=config)

    return shared


def sharing_state(create: Callable[[], Any]) -> Callable[[], Any]:
    """Returns a function that copies the initial state, because a run may donate its buffers."""
    made: list[Any] = []

    def shared() -> Any:
        if jax.device_count() > 1 or jax.__version_info__ < (0, 6):
            return create()
        if not made:
            made.append(create())
        # A jitted copy: with NumPy's memory as a donated buffer, jax 0.5.0 crashes.
        return copy_of(made[0])

    return shared


@jax.jit
def copy_of(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def sharing_lowered(lower: Callable[..., Any]) -> Callable[..., Lowered]:
    programs: dict[Any, Lowered] = {}

    def shared(**kwargs: Any) -> Lowered:
        key = tuple(sorted(kwargs.items()))
        if key not in programs:
            programs[key] = Lowered(lower(**kwargs))
        return programs[key]

    return shared


def sharing_functions(build_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the same function for the same config, so that `jax.jit` reuses its programs."""
    functions: dict[Any, Any] = {}

    def shared(config: Any, model: Any, **kwargs: Any) -> Any:
        key = (key_of(config, NOT_OF_FEATURES), model, tuple(sorted(kwargs.items())))
        if key not in functions:
            functions[key] = build_fn(config.copy_and_resolve_references(), model, **kwargs)
        return functions[key]

    return shared
