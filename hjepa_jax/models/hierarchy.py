"""The levels of the hierarchy: square cells of the patch grid, and their features.

A level-l cell covers 2^l x 2^l patches (a level-0 cell is a patch). If 2^l does not divide a side
of the grid, cells on the last row or column are smaller, and their mean is over the patches that
they have. Pooling is a product with a constant matrix: exact at the edges, differentiable, and
made of operations that every backend has.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hjepa_jax.data.sides import Sides, pair

TARGET_EPSILON = 1e-6


def level_grid(grid_size: Sides, level: int) -> tuple[int, int]:
    """Rows and columns of cells at a level."""
    rows, cols = pair(grid_size)
    return -(-rows // 2**level), -(-cols // 2**level)


def pooling_matrix(grid_size: Sides, level: int) -> Float[np.ndarray, "N_l N"]:
    """Row-stochastic matrix A_l with `z_l = A_l @ z_0`: each cell is the mean of its patches.

    Args:
      grid_size: patches per side, G, or rows and columns; patches in row-major order.
      level: level l >= 0; cells in row-major order.

    Returns:
      float32 matrix [N_l, N], N_l as in `level_grid`; rows sum to 1, columns have one non-zero.
    """
    means = []
    for side, num_cells in zip(pair(grid_size), level_grid(grid_size, level), strict=True):
        cell_of = np.arange(side) // 2**level
        member = (cell_of[None, :] == np.arange(num_cells)[:, None]).astype(np.float32)
        means.append(member / member.sum(axis=1, keepdims=True))
    return np.kron(*means)


def pool(x: Float[Array, "... N D"], grid_size: Sides, level: int) -> Float[Array, "... N_l D"]:
    """Means of the level-`level` cells, A_l x; the identity at level 0."""
    return x if level == 0 else _product(pooling_matrix(grid_size, level), x)


def standardize(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """LayerNorm without affine parameters, in float32: zero mean, unit variance over D."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + TARGET_EPSILON)


def level_features(
    tokens: Float[Array, "B N D"], grid_size: Sides, num_levels: int
) -> tuple[Float[Array, "B _ D"], ...]:
    """The features of each level, LN(A_l z_0), which probes read.

    Without a pyramid they are also the prediction targets (`HJEPA.targets`).

    Args:
      tokens: encoder output z_0 over the whole grid.
      grid_size: patches per side, G, or rows and columns.
      num_levels: L.

    Returns:
      L arrays [B, N_l, D], finest first.
    """
    return tuple(standardize(pool(tokens, grid_size, level)) for level in range(num_levels))


def hidden_cells(
    hidden: Bool[Array, "B N"], grid_size: Sides, level: int, min_coverage: float
) -> Bool[Array, "B N_l"]:
    """Cells with at least one hidden patch and at least the fraction `min_coverage` hidden."""
    member = (pooling_matrix(grid_size, level) > 0).astype(np.float32)
    needed = np.maximum(1, np.ceil(min_coverage * member.sum(axis=1) - 1e-3))
    count = _product(member, hidden[..., None].astype(jnp.float32))[..., 0]
    return count >= needed[None]


def _product(a: Float[np.ndarray, "N M"], b: Float[Array, "... M D"]) -> Float[Array, "... N D"]:
    """Product in float32. By default some accelerators multiply with 8 or 11 significant bits."""
    return jnp.matmul(a, b, precision="highest")
