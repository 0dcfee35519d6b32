"""Resamples position embeddings to another grid, with the same result as PyTorch."""

import math

import numpy as np
from jaxtyping import Float


def resample(
    table: Float[np.ndarray, "N D"], grid_size: int, *, antialias: bool
) -> Float[np.ndarray, "M D"]:
    """Resamples position embeddings from one square grid to another, bicubic, like PyTorch.

    Args:
      table: one row per patch.
      grid_size: patches per side of the new grid.
      antialias: as in `torch.nn.functional.interpolate`. It also selects the parameter of the cubic
        filter: -0.5 with antialiasing, -0.75 without.
    """
    old = math.isqrt(len(table))
    if grid_size == old:
        return table
    side = _cubic_matrix(old, grid_size, antialias=antialias)
    grid = table.reshape(old, old, -1).astype(np.float64)
    return np.einsum("pi,qj,ijd->pqd", side, side, grid).reshape(-1, table.shape[1]).astype("f4")


def _cubic_matrix(old: int, new: int, *, antialias: bool) -> Float[np.ndarray, "M N"]:
    a = -0.5 if antialias else -0.75
    stretch = max(old / new, 1.0) if antialias else 1.0
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    # Without antialiasing, samples beyond the edge repeat the edge. With antialiasing they are
    # ignored.
    margin = 0 if antialias else 2
    samples = np.arange(-margin, old + margin)
    x = np.abs(samples[None] - centres[:, None]) / stretch
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    weights /= weights.sum(axis=1, keepdims=True)
    rows = np.eye(old)[np.clip(samples, 0, old - 1)]
    return weights @ rows
