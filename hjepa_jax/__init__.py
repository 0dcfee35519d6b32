"""Hierarchical joint-embedding prediction (H-JEPA) in JAX.

    encoder = hjepa_jax.load("runs/cifar10_tiny")
    features = encoder.embed(images)  # see `hjepa_jax.api`

Importing this package starts no JAX backend and imports no TensorFlow.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    import types

    from hjepa_jax.api import Encoder

__version__ = "0.2.0"

# Old names of modules that the README of version 0.1 used. They go in 0.3.
_MOVED = {"build": "config.build", "checkpoint": "runs.load", "run_dir": "runs.workdir"}


def load(workdir: "str | os.PathLike[str]", step: int | str = "last") -> "Encoder":
    """Returns the target encoder of a run or an exported file; see `hjepa_jax.api.load`."""
    import pathlib

    from hjepa_jax import api  # JAX and Orbax take seconds to import

    return api.load(pathlib.Path(workdir), step)


def __getattr__(name: str) -> "types.ModuleType":
    """Returns a module of `_MOVED` from its new place, with a warning."""
    import importlib
    import warnings

    if name not in _MOVED:
        raise AttributeError(f"module 'hjepa_jax' has no attribute {name!r}")
    new = f"hjepa_jax.{_MOVED[name]}"
    warnings.warn(f"hjepa_jax.{name} is now {new}", DeprecationWarning, stacklevel=2)
    return importlib.import_module(new)
