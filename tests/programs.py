"""Runs of the same program share it: each is traced and compiled once in a process of the tests.

A run traces and compiles its step, its initial state and its features anew, for several CPU seconds
of the same work. Here the functions that build them return what they returned before, when they
are asked for the same again. A test about building itself asks for the fixture `own_programs`.
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

# Fields that say where images come from; the images of a source are part of the key themselves.
OF_THE_SOURCE = {"data.source", "data.dir", "data.num_workers", "data.max_labelled"}
# Fields that change no program of a run; all others may.
NOT_OF_A_RUN = OF_THE_SOURCE | {
    "log", "eval", "train.checkpoint_every_epochs", "train.checkpoint_every_steps",
    "train.keep_checkpoints", "train.max_nonfinite_steps", "train.on_collapse", "train.init_from",
}  # fmt: skip
# Fields that change no program of features or pictures; the model itself is part of their key.
NOT_OF_FEATURES = OF_THE_SOURCE | {"log", "eval", "train", "optim", "loss", "seed"}


def key_of(config: Any, without: set[str]) -> str:
    """The fields of a config but for those `without` (groups or fields), as text."""
    fields = {
        f"{group}.{name}": value
        for group, values in config.to_dict().items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    kept = {k: v for k, v in fields.items() if not {k, k.partition(".")[0]} & without}
    return json.dumps([kept, jax.default_backend(), jax.device_count()], sort_keys=True)


class Lowered:
    """A lowered program that is compiled once."""

    def __init__(self, lowered: Any):
        self._lowered, self._compiled = lowered, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)

    def compile(self) -> Any:
        if self._compiled is None:
            self._compiled = self._lowered.compile()
        return self._compiled


def share(patch: pytest.MonkeyPatch) -> None:
    """Makes the functions that build runs return the same programs for the same configs."""
    patch.setattr(train, "build_run", sharing_runs(run.build_run))
    patch.setattr(build, "build_embed_fn", sharing_functions(build.build_embed_fn))
    shared = sharing_functions(snapshot.build_snapshot_fn)
    for module in (snapshot, look, showcase):  # the last two have it by name
        patch.setattr(module, "build_snapshot_fn", shared)


def shorten_probes(patch: pytest.MonkeyPatch) -> None:
    """Linear probes try few penalties in few iterations: the same rows with other scores."""

    def short(*arrays: Any, l2_grid: Any, **options: Any) -> Any:
        return linear.linear_probe(*arrays, l2_grid=l2_grid[::4], num_iterations=10, **options)

    patch.setattr(protocols, "linear_probe", short)


def sharing_runs(build_run: Callable[..., run.Run]) -> Callable[..., run.Run]:
    runs: dict[Any, run.Run] = {}

    def shared(config: Any, source: Any) -> run.Run:
        key = (key_of(config, NOT_OF_A_RUN), source.info, source.num_images, source.records is None)
        if key not in runs:
            # A copy: the config of a test may change under the run, which reads it when it lowers.
            built = build_run(config.copy_and_resolve_references(), source)
            shared_parts = {
                "lower": sharing_lowered(built.lower),
                "create": sharing_state(built.create),
            }
            runs[key] = dataclasses.replace(built, **shared_parts)
        return dataclasses.replace(runs[key], config=config)

    return shared


def sharing_state(create: Callable[[], Any]) -> Callable[[], Any]:
    """Copies of the initial state, as a run may overwrite the one that it is given."""
    made: list[Any] = []

    def shared() -> Any:
        if jax.device_count() > 1 or jax.__version_info__ < (0, 6):
            return create()
        if not made:
            made.append(create())
        # By a program: memory of NumPy must not be donated to a step (jax 0.5.0 crashes).
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
    """Of one function object, `jax.jit` keeps the compiled programs by itself."""
    functions: dict[Any, Any] = {}

    def shared(config: Any, model: Any, **kwargs: Any) -> Any:
        key = (key_of(config, NOT_OF_FEATURES), model, tuple(sorted(kwargs.items())))
        if key not in functions:
            functions[key] = build_fn(config.copy_and_resolve_references(), model, **kwargs)
        return functions[key]

    return shared
