"""Positions of patches: embeddings that are added to tokens, or rotations of queries and keys.

Tables have one row per patch of the grid, in row-major order. The position of a cell is the mean of
its rows: the mean embedding, or the angle of the cell's centre.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from hjepa_jax.data.sides import Sides, pair

POSITIONS = ("learned", "sincos2d", "rope2d")
# Rotations per patch range from 1 radian down to nearly 1/100, for grids of up to a few hundred
# patches per side.
ROPE_BASE = 100.0


def sincos2d_positions(grid_size: Sides, width: int) -> Float[np.ndarray, "N D"]:
    """Fixed 2-D sine-cosine position embeddings: half of the width for rows, half for columns.

    References:
      Chen et al. 2021, arXiv 2104.02057 (MoCo v3), section 4.1. Frequencies 10000^(-4i/D).
    """
    frequency = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = (np.arange(side)[:, None] * frequency for side in pair(grid_size))
    return _by_place(*(np.concatenate([np.sin(x), np.cos(x)], axis=1) for x in angles))


def rope2d_angles(grid_size: Sides, head_width: int) -> Float[np.ndarray, "N d_2"]:
    """Angles by which the d / 2 feature pairs of a head are rotated: half by row, half by column.

    Positions count patches, not fractions of the image, so that the same encoder works on any grid.

    References:
      Su et al. 2021, arXiv 2104.09864 (RoPE); Heo et al. 2024, arXiv 2403.13298, section 3 ("axial"
      frequencies, base 100).
    """
    frequency = ROPE_BASE ** -(np.arange(head_width // 4) / (head_width // 4))
    return _by_place(*(np.arange(side)[:, None] * frequency for side in pair(grid_size)))


def _by_place(
    rows: Float[np.ndarray, "G d"], cols: Float[np.ndarray, "H d"]
) -> Float[np.ndarray, "N _"]:
    """Returns for each patch the features of its row, then the features of its column."""
    by_row, by_col = np.repeat(rows, len(cols), axis=0), np.tile(cols, (len(rows), 1))
    return np.concatenate([by_row, by_col], axis=1).astype(np.float32)


def turns_of(angles: Float[Array, "#B N d_2"]) -> Float[Array, "#B N d"]:
    """Rotary embedding table for `rotate`: cosines, then sines, of the angles of each token.

    Both are one array, because XLA computes it once. It would recompute two arrays in every block
    and head.
    """
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotate(x: Float[Array, "B h N d"], turns: Float[Array, "#B N d"]) -> Float[Array, "B h N d"]:
    """Rotates the pair (x_i, x_{i + d/2}) of each token by the i-th angle of the token, in float32.

    The product of a rotated query and a rotated key depends only on the difference of their angles,
    and therefore on the vector from one position to the other.
    """
    cos, sin = jnp.split(turns[:, None], 2, axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1)


def interpolate_positions(
    table: Float[Array, "N D"], old: Sides, new: Sides
) -> Float[Array, "M D"]:
    """Resizes position embeddings from the grid `old` to the grid `new`, bilinearly."""
    grid = table.reshape(*pair(old), -1)
    resized = jax.image.resize(grid, (*pair(new), grid.shape[-1]), "linear", antialias=False)
    return jnp.reshape(resized, (-1, grid.shape[-1]))


class PositionTable(nn.Module):
    """Position embeddings of all patches of the grid, [N, D], learned or fixed.

    Learned embeddings start from the sine-cosine table, not from small noise: next to patch
    embeddings of full size, small position embeddings have no effect for most of a short run
    (experiments/recipes).
    """

    kind: str
    grid_size: Sides
    width: int

    @nn.compact
    def __call__(self) -> Float[Array, "N D"]:
        table = jnp.asarray(sincos2d_positions(self.grid_size, self.width))
        if self.kind == "learned":
            return self.param("embedding", lambda _: table)
        return table
