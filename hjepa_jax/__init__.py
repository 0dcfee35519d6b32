"""Hierarchical joint-embedding prediction (H-JEPA) in JAX.

    encoder = hjepa_jax.load("runs/cifar10_tiny")
    features = encoder.embed(images)  # see `hjepa_jax.api`

Importing this package starts no JAX backend and imports no TensorFlow.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from hjepa_jax.api import Encoder

__version__ = "0.1.0"


def load(workdir: "str | os.PathLike[str]", step: int | str = "last") -> "Encoder":
    """The target encoder of a run; see `hjepa_jax.api.load`."""
    import pathlib

    from hjepa_jax import api  # JAX and Orbax take seconds to import

    return api.load(pathlib.Path(workdir), step)
