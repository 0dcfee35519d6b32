"""Masks of scattered cells."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hjepa_jax.data.sides import pair
from hjepa_jax.errors import InputError
from hjepa_jax.masks.choice import lowest_first, rank, uniform_int
from hjepa_jax.masks.samplers import MaskSampler


@dataclasses.dataclass(frozen=True)
class RandomMask(MaskSampler):
    """Targets are scattered cells of a level: one set per image, M = 1.

    Attributes:
      scale: smallest and largest fraction of the cells that are targets; their number is uniform
        among the whole numbers in this range.
      align_level: the level of the cells.
    """

    scale: tuple[float, float] = (0.15, 0.2)
    align_level: int = 0

    def __post_init__(self):
        low, high = self._counts
        if low > high:
            num_cells = self._cell_areas.size
            rule = f"no whole number of the {num_cells} cells is in this range; one cell is "
            raise InputError("mask.scale", tuple(self.scale), rule + f"{1 / num_cells:.4g}")
        self.check_context(self.scale)

    @property
    def _counts(self) -> tuple[int, int]:
        """Smallest and largest number of target cells."""
        low, high = (fraction * self._cell_areas.size for fraction in self.scale)
        return max(1, int(np.ceil(low - 1e-6))), int(np.floor(high + 1e-6))

    @property
    def _cell_areas(self) -> Int[np.ndarray, " C"]:
        """Number of patches of each cell, ascending: cells cut by the edge of the grid first."""
        cell_size = 2**self.align_level
        heights, widths = (
            np.minimum(cell_size, side - np.arange(0, side, cell_size))
            for side in pair(self.grid_size)
        )
        return np.sort(np.outer(heights, widths).reshape(-1))

    @property
    def block_capacity(self) -> int:
        """T, patches of the largest possible set of targets."""
        return int(self._cell_areas[-self._counts[1] :].sum())

    @property
    def num_draws(self) -> int:
        return 1 + self._cell_areas.size

    @property
    def visible_fraction(self) -> float:
        return 1.0 - float(np.mean(self._counts)) / self._cell_areas.size

    @property
    def smallest_union(self) -> int:
        return int(self._cell_areas[: self._counts[0]].sum())

    def sample_targets(
        self, u: Float[Array, " _"]
    ) -> tuple[Int[Array, "M T"], Bool[Array, "M T"], Bool[Array, " N"]]:
        (rows, cols), cell_size = pair(self.grid_size), 2**self.align_level
        low, high = self._counts
        count = low + uniform_int(u[0], high - low + 1)
        r, c = -(-rows // cell_size), -(-cols // cell_size)
        cells = (rank(u[1:]) < count).reshape(r, 1, c, 1)
        patches = jnp.broadcast_to(cells, (r, cell_size, c, cell_size))
        hidden = patches.reshape(r * cell_size, c * cell_size)[:rows, :cols].reshape(-1)
        order = jnp.where(hidden, 0.0, 1.0)
        index, valid = lowest_first(order, jnp.sum(hidden), self.block_capacity)
        return index[None], valid[None], hidden
