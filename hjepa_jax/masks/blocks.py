"""Rectangular blocks of whole cells on the patch grid: possible shapes, and random placement.

A cell is a square of patches, cut at the edge of the grid if the cell size does not divide the
grid. An aspect ratio of 1 is the aspect ratio of the grid. A block is a function of uniform
numbers, so that it can be sampled inside jit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hjepa_jax.data.sides import Sides, pair
from hjepa_jax.errors import InputError
from hjepa_jax.masks.choice import is_first_smallest, uniform_int


def block_shapes(
    grid_size: Sides,
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    *,
    cell_size: int = 1,
    field: str = "mask.scale",
) -> Int[np.ndarray, "S 2"]:
    """All block shapes (height, width), in cells, that satisfy area and aspect ratio.

    Args:
      grid_size: patches per side of the grid, G, or rows and columns.
      scale: smallest and largest area as a fraction of the grid, in (0, 1].
      aspect_ratio: smallest and largest height / width, relative to the grid's.
      cell_size: side of a cell in patches; blocks consist of whole cells.
      field: the config field to name when no shape fits.

    Raises:
      InputError: when no block of whole cells satisfies both ranges.
    """
    sides = [np.arange(1, -(-side // cell_size) + 1) for side in pair(grid_size)]
    cells = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
    area, aspect = _area_and_aspect(cells, grid_size, cell_size)
    eps = 1e-6
    in_aspect = (aspect >= aspect_ratio[0] - eps) & (aspect <= aspect_ratio[1] + eps)
    fits = in_aspect & (area >= scale[0] - eps) & (area <= scale[1] + eps)
    if not fits.any():
        possible = sorted({round(float(a), 3) for a in area[in_aspect]})
        rows, cols = pair(grid_size)
        raise InputError(
            field,
            tuple(scale),
            f"no block of whole {cell_size}x{cell_size}-patch cells on a {rows}x{cols} "
            f"grid has its area in {tuple(scale)} and its aspect ratio in {tuple(aspect_ratio)}; "
            f"areas that exist: {possible}",
        )
    return cells[fits]


def _area_and_aspect(
    cells: Int[np.ndarray, "S 2"], grid_size: Sides, cell_size: int
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Area and height / width of blocks with these sides in cells, both relative to the grid's."""
    rows, cols = pair(grid_size)
    height, width = np.minimum(cells * cell_size, (rows, cols)).T
    return height * width / (rows * cols), height * cols / (width * rows)


@struct.dataclass
class Block:
    """A rectangle of patches: first row and column, number of rows and columns (int32 scalars)."""

    top: Any
    left: Any
    height: Any
    width: Any


@dataclasses.dataclass(frozen=True)
class BlockSampler:
    """Places one block.

    Attributes:
      grid_size: patches per side, G, or rows and columns.
      scale: area of the block, fraction of the grid (uniform).
      aspect_ratio: its height / width, relative to the grid's (log-uniform).
      cell_size: side of its cells, in patches.
      field: the config field to name when no block fits.
    """

    grid_size: Sides
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
        """Mean number of patches of each shape over its placements; the grid's edge cuts cells."""
        return self._areas(np.mean)

    @property
    def smallest(self) -> int:
        """Number of patches of the smallest block, at the placement that cuts it most."""
        return int(self._areas(np.min).min())

    @property
    def capacity(self) -> int:
        """Number of patches of the largest block, at the placement that cuts it least."""
        return int(self._areas(np.max).max())

    def _areas(self, of_placements: Callable[..., Any]) -> Float[np.ndarray, " S"]:
        def length(num_cells: int, side: int) -> float:  # in patches
            start = np.arange(-(-side // self.cell_size) - num_cells + 1) * self.cell_size
            return float(of_placements(np.minimum(num_cells * self.cell_size, side - start)))

        sides = pair(self.grid_size)
        found = [
            [length(n, s) for n, s in zip(x, sides, strict=True)] for x in self.shapes.tolist()
        ]
        return np.array(found).prod(axis=1)

    def place(self, u: Float[Array, "4"]) -> Block:
        """Draws area, aspect ratio and position of a block from four uniform numbers.

        The block gets the shape that is nearest to the area and the aspect ratio.
        """
        shapes, cell_size, (rows, cols) = self.shapes, self.cell_size, pair(self.grid_size)
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * u[0]
        low, high = np.log(self.aspect_ratio)
        log_aspect = low + (high - low) * u[1]
        log_areas, log_aspects = (
            np.log(x).astype(np.float32)
            for x in _area_and_aspect(shapes, self.grid_size, cell_size)
        )
        distance = (log_areas - jnp.log(area)) ** 2 + (log_aspects - log_aspect) ** 2
        nearest = is_first_smallest(distance)
        height = jnp.sum(nearest * shapes[:, 0], dtype=jnp.int32)
        width = jnp.sum(nearest * shapes[:, 1], dtype=jnp.int32)
        top = uniform_int(u[2], -(-rows // cell_size) - height + 1) * cell_size
        left = uniform_int(u[3], -(-cols // cell_size) - width + 1) * cell_size
        return Block(
            top=top,
            left=left,
            height=jnp.minimum(height * cell_size, rows - top),
            width=jnp.minimum(width * cell_size, cols - left),
        )


def block_tokens(
    block: Block, grid_size: Sides, capacity: int
) -> tuple[Int[Array, " T"], Bool[Array, " T"]]:
    """Patch indices of a block, row by row, padded to `capacity`."""
    t = jnp.arange(capacity, dtype=jnp.int32)
    row, col = t // block.width, t % block.width
    valid = row < block.height
    index = (block.top + row) * pair(grid_size)[1] + block.left + col
    return jnp.where(valid, index, 0), valid


def covers(blocks: Sequence[Block], grid_size: Sides) -> Bool[Array, " N"]:
    """Which patches of the grid at least one of the blocks covers.

    Computed as a matrix product of rows and columns, so that XLA does not fuse it into `rank` and
    recompute it N^2 times.
    """

    def inside(side: int, start: Int[Array, ""], length: Int[Array, ""]) -> Float[Array, " G"]:
        patch = jnp.arange(side)
        return ((patch >= start) & (patch < start + length)).astype(jnp.float32)

    num_rows, num_cols = pair(grid_size)
    rows = jnp.stack([inside(num_rows, block.top, block.height) for block in blocks])
    cols = jnp.stack([inside(num_cols, block.left, block.width) for block in blocks])
    return (rows.T @ cols > 0.5).reshape(-1)
