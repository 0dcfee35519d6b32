"""Rectangular blocks of whole cells on the grid of patches: which there are, and where one lies.

A grid is G x G patches; a cell is a square of patches, cut at the edge of a grid that cells do
not divide. A block is drawn from uniform numbers, so that it can be sampled inside jit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hjepa_jax.errors import InputError
from hjepa_jax.masks.choice import is_first_smallest, uniform_int


def block_shapes(
    grid_size: int,
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    *,
    cell_size: int = 1,
    field: str = "mask.scale",
) -> Int[np.ndarray, "S 2"]:
    """All block shapes (height, width), in cells, that satisfy area and aspect ratio.

    Args:
      grid_size: patches per side of the grid, G.
      scale: smallest and largest area as a fraction of the grid, in (0, 1].
      aspect_ratio: smallest and largest height / width, in patches.
      cell_size: side of a cell in patches; blocks consist of whole cells.
      field: the config field to name when no shape fits.

    Raises:
      InputError: when no block of whole cells satisfies both ranges.
    """
    side = np.arange(1, -(-grid_size // cell_size) + 1)
    cells = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
    patches = np.minimum(cells * cell_size, grid_size)
    area = patches.prod(axis=1) / grid_size**2
    aspect = patches[:, 0] / patches[:, 1]
    eps = 1e-6
    in_aspect = (aspect >= aspect_ratio[0] - eps) & (aspect <= aspect_ratio[1] + eps)
    fits = in_aspect & (area >= scale[0] - eps) & (area <= scale[1] + eps)
    if not fits.any():
        possible = sorted({round(float(a), 3) for a in area[in_aspect]})
        raise InputError(
            field,
            tuple(scale),
            f"no block of whole {cell_size}x{cell_size}-patch cells on a {grid_size}x{grid_size} "
            f"grid has its area in {tuple(scale)} and its aspect ratio in {tuple(aspect_ratio)}; "
            f"areas that exist: {possible}",
        )
    return cells[fits]


@struct.dataclass
class Block:
    """A rectangle of patches: first row and column, and how many of each (int32 scalars)."""

    top: Any
    left: Any
    height: Any
    width: Any


@dataclasses.dataclass(frozen=True)
class BlockSampler:
    """Places one block.

    Attributes:
      grid_size: patches per side, G.
      scale: area of the block, fraction of the grid (uniform).
      aspect_ratio: its height / width (log-uniform).
      cell_size: side in patches of the cells that it consists of.
      field: the config field to name when no block fits.
    """

    grid_size: int
    scale: tuple[float, float]
    aspect_ratio: tuple[float, float]
    cell_size: int = 1
    field: str = "mask.scale"

    @property
    def shapes(self) -> Int[np.ndarray, "S 2"]:
        """See `block_shapes`."""
        return block_shapes(
            self.grid_size,
            self.scale,
            self.aspect_ratio,
            cell_size=self.cell_size,
            field=self.field,
        )

    @property
    def areas(self) -> Float[np.ndarray, " S"]:
        """Patches of each shape, the mean over its placements: the edge of the grid cuts cells."""
        return self._areas(np.mean)

    @property
    def smallest(self) -> int:
        """Patches of the smallest block, where it is cut most."""
        return int(self._areas(np.min).min())

    @property
    def capacity(self) -> int:
        """Patches of the largest block, where it is cut least."""
        return int(self._areas(np.max).max())

    def _areas(self, of_placements: Callable[..., Any]) -> Float[np.ndarray, " S"]:
        cells_per_side = -(-self.grid_size // self.cell_size)
        lengths = []  # in patches, of one cell in a row, two, ...
        for num_cells in range(1, cells_per_side + 1):
            start = np.arange(cells_per_side - num_cells + 1) * self.cell_size
            cut = np.minimum(num_cells * self.cell_size, self.grid_size - start)
            lengths.append(float(of_placements(cut)))
        return np.array(lengths)[self.shapes - 1].prod(axis=1)

    def place(self, u: Float[Array, "4"]) -> Block:
        """From four uniform numbers: area and aspect ratio, the nearest shape, its position."""
        shapes, grid_size, cell_size = self.shapes, self.grid_size, self.cell_size
        cells_per_side = -(-grid_size // cell_size)
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * u[0]
        low, high = np.log(self.aspect_ratio)
        log_aspect = low + (high - low) * u[1]
        patches = np.minimum(shapes * cell_size, grid_size)
        log_areas = np.log(patches.prod(axis=1) / grid_size**2).astype(np.float32)
        log_aspects = np.log(patches[:, 0] / patches[:, 1]).astype(np.float32)
        distance = (log_areas - jnp.log(area)) ** 2 + (log_aspects - log_aspect) ** 2
        nearest = is_first_smallest(distance)
        height = jnp.sum(nearest * shapes[:, 0], dtype=jnp.int32)
        width = jnp.sum(nearest * shapes[:, 1], dtype=jnp.int32)
        top = uniform_int(u[2], cells_per_side - height + 1) * cell_size
        left = uniform_int(u[3], cells_per_side - width + 1) * cell_size
        return Block(
            top=top,
            left=left,
            height=jnp.minimum(height * cell_size, grid_size - top),
            width=jnp.minimum(width * cell_size, grid_size - left),
        )


def block_tokens(
    block: Block, grid_size: int, capacity: int
) -> tuple[Int[Array, " T"], Bool[Array, " T"]]:
    """Patch indices of a block, row by row, padded to `capacity`."""
    t = jnp.arange(capacity, dtype=jnp.int32)
    row, col = t // block.width, t % block.width
    valid = row < block.height
    index = (block.top + row) * grid_size + block.left + col
    return jnp.where(valid, index, 0), valid


def covers(blocks: Sequence[Block], grid_size: int) -> Bool[Array, " N"]:
    """Which patches of the grid at least one of the blocks covers.

    Computed as a matrix product of rows and columns, so that XLA does not fuse it into `rank` and
    recompute it N^2 times.
    """
    side = jnp.arange(grid_size)

    def inside(start: Int[Array, ""], length: Int[Array, ""]) -> Float[Array, " G"]:
        return ((side >= start) & (side < start + length)).astype(jnp.float32)

    rows = jnp.stack([inside(block.top, block.height) for block in blocks])
    cols = jnp.stack([inside(block.left, block.width) for block in blocks])
    return (rows.T @ cols > 0.5).reshape(-1)
