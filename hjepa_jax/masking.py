"""Masks sampled inside jit from explicit PRNG keys: which patches are context, which are targets.

Shapes are static so that the training step compiles once: index arrays are padded, and a boolean
array beside each says which entries are real. Every integer here counts patches of a G x G grid
in row-major order (N = G^2). Sampling sorts nothing (Apple's plugins do not sort reliably): a
random choice is a *rank*, counted by comparison.

References:
  Assran et al. 2023, arXiv 2301.08243, section 3 (multi-block masks). Here a block may lie on
  every placement, last row and column included, and blocks consist of whole cells of a level, so
  that coarse targets are fully hidden; the size of a block is drawn among the shapes that
  satisfy area and aspect ratio exactly, not rounded out of the range.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from hjepa_jax.errors import InputError

# A raw uint32 key (what checkpoints and every plugin can hold) or a typed key.
Rng = UInt32[Array, "2"] | PRNGKeyArray


@struct.dataclass
class Masks:
    """The masks of a batch (or of one image, without the leading axis B).

    Attributes:
      context_index: int32 [B, K], patches that the context encoder sees.
      context_valid: bool [B, K], False where the entry is padding.
      target_index: int32 [B, M, T], the patches of each target block.
      target_valid: bool [B, M, T].
    """

    context_index: Any
    context_valid: Any
    target_index: Any
    target_valid: Any


def rank(x: Float[Array, " N"]) -> Int[Array, " N"]:
    """Position of each entry in ascending order, ties broken by index: a permutation of 0..N-1."""
    index = jnp.arange(x.shape[0])
    smaller = x[None, :] < x[:, None]
    tied_before = (x[None, :] == x[:, None]) & (index[None, :] < index[:, None])
    return jnp.sum(smaller | tied_before, axis=1, dtype=jnp.int32)


def gather_tokens(
    x: Float[Array, "B N D"] | Float[Array, "N D"], index: Int[Array, "B K"]
) -> Float[Array, "B K D"]:
    """Rows `x[b, index[b, k]]` (or `x[index[b, k]]` of a table that all images share).

    A product with a one-hot matrix: its gradient is a product too, where that of an indexed
    gather is a scatter, slow on some backends and refused by others.
    """
    one_hot = (index[..., None] == jnp.arange(x.shape[-2])[None, None]).astype(x.dtype)
    # HIGHEST: rows are copied exactly, where the backend would otherwise round the product.
    return jnp.matmul(one_hot, x, precision=jax.lax.Precision.HIGHEST)


def target_union(masks: Masks, num_patches: int) -> Bool[Array, "B N"]:
    """Which patches at least one target block covers."""
    patches = jnp.arange(num_patches)[None, None, None]
    hit = (masks.target_index[..., None] == patches) & masks.target_valid[..., None]
    return jnp.any(hit, axis=(1, 2))


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
            f"grid has its area in this range and its aspect ratio in {tuple(aspect_ratio)}; "
            f"areas that exist: {possible}",
        )
    return cells[fits]


@dataclasses.dataclass(frozen=True)
class MultiBlockMask:
    """Samples `num_blocks` rectangular target blocks and the context that remains.

    Attributes:
      grid_size: patches per side, G.
      num_blocks: target blocks per image, M.
      scale: area of a target block, fraction of the grid (uniform).
      aspect_ratio: height / width of a target block (log-uniform).
      context_scale: area of the context block, from which the targets are removed.
      context_aspect_ratio: height / width of the context block.
      align_level: target blocks consist of whole cells of this level.
      num_context: context tokens kept, K; None takes the expected number of visible patches,
        rounded up to a multiple of 8.
    """

    grid_size: int
    num_blocks: int = 4
    scale: tuple[float, float] = (0.15, 0.2)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    context_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    align_level: int = 0
    num_context: int | None = None

    def __post_init__(self):
        if self.num_blocks < 1:
            raise InputError("mask.num_blocks", self.num_blocks, "must be at least 1")
        if self.num_context is not None and not 1 <= self.num_context <= self.num_patches:
            raise InputError(
                "mask.num_context", self.num_context, f"must be in 1..{self.num_patches} patches"
            )
        smallest_target = self._target_shapes.prod(axis=1).min() * self.cell_size**2
        largest_context = self._context_shapes.prod(axis=1).max()
        if largest_context <= smallest_target or self.expected_num_visible < 1:
            raise InputError(
                "mask.scale",
                tuple(self.scale),
                f"{self.num_blocks} blocks of this size leave no context in a block of "
                f"mask.context_scale={tuple(self.context_scale)}",
            )

    @property
    def num_patches(self) -> int:
        """N = G^2."""
        return self.grid_size**2

    @property
    def cell_size(self) -> int:
        """Side in patches of the cells that target blocks consist of."""
        return 2**self.align_level

    @property
    def _target_shapes(self) -> np.ndarray:
        return block_shapes(self.grid_size, self.scale, self.aspect_ratio, cell_size=self.cell_size)

    @property
    def _context_shapes(self) -> np.ndarray:
        return block_shapes(
            self.grid_size,
            self.context_scale,
            self.context_aspect_ratio,
            field="mask.context_scale",
        )

    @property
    def block_capacity(self) -> int:
        """T, patches of the largest possible target block."""
        patches = np.minimum(self._target_shapes * self.cell_size, self.grid_size)
        return int(patches.prod(axis=1).max())

    @property
    def expected_num_visible(self) -> float:
        """Expected number of visible patches if blocks covered every patch equally often."""
        target = np.mean(self._target_shapes.prod(axis=1)) * self.cell_size**2 / self.num_patches
        context = np.mean(self._context_shapes.prod(axis=1))
        return float(context * max(0.0, 1.0 - target) ** self.num_blocks)

    @property
    def context_capacity(self) -> int:
        """K, the static number of context tokens."""
        if self.num_context is not None:
            return self.num_context
        return min(self.num_patches, 8 * int(np.ceil(self.expected_num_visible / 8)))

    def __call__(self, rngs: Rng | UInt32[Array, "B 2"]) -> Masks:
        """Samples the masks of a batch from one key per image, [B] keys."""
        return jax.vmap(self._sample_image)(rngs)

    def _sample_image(self, rng: Rng) -> Masks:
        # One draw for everything: four numbers per block, then one per patch.
        n, m = self.num_patches, self.num_blocks
        u = jax.random.uniform(rng, (4 * (m + 1) + n,))
        blocks = [
            _place_block(
                u[4 * i : 4 * i + 4],
                self._target_shapes,
                self.grid_size,
                self.cell_size,
                self.scale,
                self.aspect_ratio,
            )
            for i in range(m)
        ]
        tokens = [_block_tokens(b, self.grid_size, self.block_capacity) for b in blocks]
        target_index = jnp.stack([index for index, _ in tokens])
        target_valid = jnp.stack([valid for _, valid in tokens])

        context_block = _place_block(
            u[4 * m : 4 * m + 4],
            self._context_shapes,
            self.grid_size,
            1,
            self.context_scale,
            self.context_aspect_ratio,
        )
        visible = _covers(context_block, self.grid_size)
        for block in blocks:
            visible &= ~_covers(block, self.grid_size)

        # A uniformly random subset of the visible patches: rank them in random order, hidden last.
        slot = rank(u[4 * (m + 1) :] + jnp.where(visible, 0.0, 1.0))
        is_slot = slot[None, :] == jnp.arange(self.context_capacity)[:, None]
        context_index = jnp.sum(is_slot * jnp.arange(n)[None], axis=1, dtype=jnp.int32)
        context_valid = jnp.arange(self.context_capacity) < jnp.sum(visible)
        return Masks(
            context_index=jnp.where(context_valid, context_index, 0),
            context_valid=context_valid,
            target_index=target_index,
            # An image that shows nothing can predict nothing: it must not weigh in the loss.
            target_valid=target_valid & jnp.any(visible),
        )


@struct.dataclass
class _Block:
    """A rectangle of patches: first row and column, and how many of each (int32 scalars)."""

    top: Any
    left: Any
    height: Any
    width: Any


def _place_block(
    u: Float[Array, "4"],
    shapes: Int[np.ndarray, "S 2"],
    grid_size: int,
    cell_size: int,
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
) -> _Block:
    """From four uniform numbers: area and aspect ratio, the nearest of `shapes`, its position."""
    cells_per_side = -(-grid_size // cell_size)
    area = scale[0] + (scale[1] - scale[0]) * u[0]
    low, high = np.log(aspect_ratio)
    log_aspect = low + (high - low) * u[1]
    patches = np.minimum(shapes * cell_size, grid_size)
    log_areas = np.log(patches.prod(axis=1) / grid_size**2).astype(np.float32)
    log_aspects = np.log(patches[:, 0] / patches[:, 1]).astype(np.float32)
    distance = (log_areas - jnp.log(area)) ** 2 + (log_aspects - log_aspect) ** 2
    nearest = rank(distance) == 0
    height = jnp.sum(nearest * shapes[:, 0], dtype=jnp.int32)
    width = jnp.sum(nearest * shapes[:, 1], dtype=jnp.int32)
    top = _uniform_int(u[2], cells_per_side - height + 1) * cell_size
    left = _uniform_int(u[3], cells_per_side - width + 1) * cell_size
    return _Block(
        top=top,
        left=left,
        height=jnp.minimum(height * cell_size, grid_size - top),
        width=jnp.minimum(width * cell_size, grid_size - left),
    )


def _uniform_int(u: Float[Array, ""], num_values: Int[Array, ""]) -> Int[Array, ""]:
    """Uniform on 0..num_values-1 for u uniform on [0, 1)."""
    value = jnp.floor(u * num_values).astype(jnp.int32)
    return jnp.minimum(value, num_values - 1)  # u * n may round up to n


def _block_tokens(
    block: _Block, grid_size: int, capacity: int
) -> tuple[Int[Array, " T"], Bool[Array, " T"]]:
    """Patch indices of a block, row by row, padded to `capacity`."""
    t = jnp.arange(capacity, dtype=jnp.int32)
    row, col = t // block.width, t % block.width
    valid = row < block.height
    index = (block.top + row) * grid_size + block.left + col
    return jnp.where(valid, index, 0), valid


def _covers(block: _Block, grid_size: int) -> Bool[Array, " N"]:
    """Which patches of the grid the block covers."""
    side = jnp.arange(grid_size)
    rows = (side >= block.top) & (side < block.top + block.height)
    cols = (side >= block.left) & (side < block.left + block.width)
    return (rows[:, None] & cols[None, :]).reshape(-1)
