"""Masks sampled inside jit from explicit PRNG keys: which patches are context, which are targets.

Shapes are static so that the training step compiles once: index arrays are padded, and a boolean
array beside each says which entries are real. Every integer here counts patches of the grid in
row-major order (N = G^2, or rows x columns). Apple's plugins do not sort reliably, so a random
choice is a *rank*, counted by comparison if there are at most `choice.MAX_COMPARED` patches.

>>> sample_masks = jax.jit(MultiBlockMask(8, num_blocks=4, scale=(0.15, 0.25)))
>>> masks = sample_masks(jax.random.split(jax.random.PRNGKey(0), 16))  # of 16 images
>>> masks.context_index.shape, masks.target_index.shape
((16, 24), (16, 4, 16))

References:
  Assran et al. 2023, arXiv 2301.08243, section 3 (multi-block masks). Three things differ here. A
  block may lie on every placement, last row and column included. Blocks consist of whole cells of
  a level, so that coarse targets are fully hidden. A block has the shape nearest to a drawn area
  and aspect ratio, among the shapes that satisfy the ranges of both. If cells do not divide the
  grid, a block on the last row or column is cut there.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from hjepa_jax.data.sides import Sides, pair
from hjepa_jax.errors import InputError
from hjepa_jax.masks.blocks import BlockSampler, block_tokens, covers
from hjepa_jax.masks.choice import lowest_first
from hjepa_jax.masks.masks import Masks, Rng


@dataclasses.dataclass(frozen=True)
class MaskSampler:
    """Base class of all masks: samples targets, and a context block without the targets.

    A subclass samples the targets (`sample_targets`) and states how many patches they cover.

    Attributes:
      grid_size: patches per side, G, or rows and columns.
      context_scale: area of the context block, from which the targets are removed; fraction of the
        grid.
      context_aspect_ratio: height / width of the context block, relative to the grid's.
      num_context: number of context tokens, K; None = the expected number of visible patches,
        rounded up to a multiple of 8.
    """

    grid_size: Sides
    _: dataclasses.KW_ONLY
    context_scale: tuple[float, float] = (0.85, 1.0)
    context_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    num_context: int | None = None

    @property
    def num_draws(self) -> int:
        """Number of uniform numbers that `sample_targets` takes."""
        raise NotImplementedError

    @property
    def visible_fraction(self) -> float:
        """Expected fraction of patches that are not targets, if all are targets equally often."""
        raise NotImplementedError

    @property
    def smallest_union(self) -> int:
        """Smallest possible number of target patches."""
        raise NotImplementedError

    def sample_targets(
        self, u: Float[Array, " _"]
    ) -> tuple[Int[Array, "M T"], Bool[Array, "M T"], Bool[Array, " N"]]:
        """Returns index and validity of the targets, and which patches they hide."""
        raise NotImplementedError

    @property
    def num_patches(self) -> int:
        """N, number of patches of the grid."""
        return math.prod(pair(self.grid_size))

    @property
    def expected_num_visible(self) -> float:
        """Expected number of visible patches, if all were targets equally often."""
        return float(np.mean(self._context_block.areas) * self.visible_fraction)

    @property
    def context_capacity(self) -> int:
        """K, the static number of context tokens."""
        if self.num_context is not None:
            return self.num_context
        return min(self.num_patches, 8 * int(np.ceil(self.expected_num_visible / 8)))

    @property
    def _context_block(self) -> BlockSampler:
        return BlockSampler(
            self.grid_size,
            self.context_scale,
            self.context_aspect_ratio,
            field="mask.context_scale",
        )

    def check_context(self, scale: tuple[float, float]) -> None:
        """Checks that the targets leave visible patches.

        Raises:
          InputError: naming `mask.num_context`, or `mask.scale` with the value `scale`.
        """
        if self.num_context is not None and not 1 <= self.num_context <= self.num_patches:
            raise InputError(
                "mask.num_context", self.num_context, f"must be in 1..{self.num_patches} patches"
            )
        largest_context = self._context_block.areas.max()
        if largest_context <= self.smallest_union or self.expected_num_visible < 1:
            raise InputError(
                "mask.scale",
                tuple(scale),
                "targets of this size leave no context in a block of "
                f"mask.context_scale={tuple(self.context_scale)}",
            )

    def __call__(self, rngs: Rng | UInt32[Array, "B 2"]) -> Masks:
        """Samples the masks of a batch from one key per image, [B] keys."""
        return jax.vmap(self._sample_image)(rngs)

    def _sample_image(self, rng: Rng) -> Masks:
        # One draw for everything: targets, context block, then one number per patch.
        of_targets, of_context = self.num_draws, self.num_draws + 4
        u = jax.random.uniform(rng, (of_context + self.num_patches,))
        target_index, target_valid, hidden = self.sample_targets(u[:of_targets])
        context_block = self._context_block.place(u[of_targets:of_context])
        visible = covers([context_block], self.grid_size) & ~hidden
        # A uniformly random subset of the visible patches: in random order, hidden last.
        context_index, context_valid = lowest_first(
            u[of_context:] + jnp.where(visible, 0.0, 1.0),
            jnp.sum(visible),
            self.context_capacity,
        )
        return Masks(
            context_index=context_index,
            context_valid=context_valid,
            target_index=target_index,
            # Without visible patches nothing can be predicted: the targets do not count.
            target_valid=target_valid & jnp.any(visible),
        )


@dataclasses.dataclass(frozen=True)
class BlockMask(MaskSampler):
    """Masks with rectangular blocks as targets.

    Attributes:
      num_blocks: target blocks per image, M.
      scale: area of a target block, fraction of the grid (uniform).
      aspect_ratio: height / width of a target block, relative to the grid's (log-uniform).
    """

    num_blocks: int = 4
    scale: tuple[float, float] = (0.15, 0.2)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)

    def __post_init__(self):
        if self.num_blocks < 1:
            raise InputError("mask.num_blocks", self.num_blocks, "must be at least 1")
        self.check_context(self.scale)

    @property
    def blocks(self) -> tuple[BlockSampler, ...]:
        """The sampler of each of the M blocks."""
        raise NotImplementedError

    @property
    def block_capacity(self) -> int:
        """T, patches of the largest possible target block."""
        return max(block.capacity for block in self.blocks)

    @property
    def num_draws(self) -> int:
        return 4 * self.num_blocks

    @property
    def visible_fraction(self) -> float:
        hidden = (float(np.mean(block.areas)) / self.num_patches for block in self.blocks)
        return math.prod(max(0.0, 1.0 - fraction) for fraction in hidden)

    @property
    def smallest_union(self) -> int:
        return max(block.smallest for block in self.blocks)

    def sample_targets(
        self, u: Float[Array, " _"]
    ) -> tuple[Int[Array, "M T"], Bool[Array, "M T"], Bool[Array, " N"]]:
        placed = [block.place(u[4 * i : 4 * i + 4]) for i, block in enumerate(self.blocks)]
        tokens = [block_tokens(block, self.grid_size, self.block_capacity) for block in placed]
        index, valid = (jnp.stack(arrays) for arrays in zip(*tokens, strict=True))
        return index, valid, covers(placed, self.grid_size)


@dataclasses.dataclass(frozen=True)
class MultiBlockMask(BlockMask):
    """Blocks of one distribution, made of whole cells of level `align_level`."""

    align_level: int = 0

    @property
    def blocks(self) -> tuple[BlockSampler, ...]:
        cell_size = 2**self.align_level
        block = BlockSampler(self.grid_size, self.scale, self.aspect_ratio, cell_size)
        return (block,) * self.num_blocks


@dataclasses.dataclass(frozen=True)
class HierarchicalMask(BlockMask):
    """Block m belongs to level m mod L: it has whole cells of it and a larger area.

    Attributes:
      num_levels: L.
      progression: (kind, factor). Blocks of level 0 have the area `scale`. Blocks of level l are
        larger by factor^l ("geometric") or by 1 + (factor - 1) l ("linear").
    """

    num_levels: int = 2
    progression: tuple[str, float] = ("geometric", 1.5)

    def __post_init__(self):
        if self.num_blocks < self.num_levels:
            rule = f"must be at least {self.num_levels}, a block for each level"
            raise InputError("mask.num_blocks", self.num_blocks, rule)
        super().__post_init__()

    @property
    def blocks(self) -> tuple[BlockSampler, ...]:
        levels = [self._block(level) for level in range(self.num_levels)]
        return tuple(levels[m % self.num_levels] for m in range(self.num_blocks))

    def _block(self, level: int) -> BlockSampler:
        kind, factor = self.progression
        growth = factor**level if kind == "geometric" else 1.0 + (factor - 1.0) * level
        low, high = (area * growth for area in self.scale)
        # mask.scale is the area at level 0. If a higher level does not fit, the error names
        # mask.progression.
        try:
            if high > 1.0:
                raise InputError("mask.scale", self.scale, f"blocks take {high:.3g} of the grid")
            block = BlockSampler(self.grid_size, (low, high), self.aspect_ratio, 2**level)
            _ = block.shapes
        except InputError as error:
            if level == 0:
                raise
            rule = f"at level {level}: {error.rule}"
            raise InputError("mask.progression", self.progression, rule) from None
        return block
