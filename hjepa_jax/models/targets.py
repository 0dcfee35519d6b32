"""What is predicted: features that the target encoder has of whole images, at every level."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from hjepa_jax.models.hierarchy import global_feature, pool, standardize
from hjepa_jax.models.hjepa import HJEPA

# Per level, finest first, then for the global one: the blocks, from 1, whose mean it is made of.
TargetBlocks = tuple[tuple[int, ...], ...]


@struct.dataclass
class Targets:
    """Features of B images.

    Attributes:
      levels: L arrays float32 [B, N_l, D], finest first: LN(A_l z_l), or LN of what the pyramid
        makes of them. z_l is the output of the encoder, where no other blocks are chosen.
      whole: the global level, LN of the mean of all tokens, float32 [B, 1, D].
      tokens: output of the encoder, float32 [B, N, D].
    """

    levels: tuple[Any, ...]
    whole: Any
    tokens: Any


def target_blocks(
    depth: int,
    num_levels: int,
    *,
    num_layers: int = 1,
    level_depths: Sequence[int] | None = None,
) -> TargetBlocks:
    """The blocks that targets are made of: of each level the last `num_layers` up to its depth.

    Args:
      depth: blocks of the encoder; the depth of the global level.
      num_levels: L.
      num_layers: k, how many blocks are averaged (Baevski et al. 2022, arXiv 2202.03555, section
        3.3).
      level_depths: of each level, from k to `depth`; None for `depth`.
    """
    ends = (*((depth,) * num_levels if level_depths is None else level_depths), depth)
    return tuple(tuple(range(end, end - num_layers, -1)) for end in ends)


def encode_targets(
    model: HJEPA, encoder_params: Any, pixels: Float[Array, "B H W C"], blocks: TargetBlocks
) -> Targets:
    """Targets of every level.

    Args:
      model: the networks.
      encoder_params: of its encoder, online or EMA.
      pixels: normalised images.
      blocks: what the targets are made of (`target_blocks`).
    """
    depth, grid_size = model.context_encoder.depth, model.predictor.grid_size
    wanted = sorted({depth, *(block for level in blocks for block in level)})
    outputs = block_outputs(model, encoder_params, pixels, wanted)
    tokens = {block: found for block, (found, _) in zip(wanted, outputs, strict=True)}
    *mixed, whole = (_mean([tokens[block] for block in level]) for level in blocks)
    levels = tuple(standardize(pool(z, grid_size, level)) for level, z in enumerate(mixed))
    if model.context_encoder.pyramid is not None:
        apply: Any = model.apply
        variables = {"params": {"context_encoder": encoder_params}}
        levels = tuple(map(standardize, apply(variables, levels, method="fuse_levels")))
    return Targets(levels, global_feature(whole), tokens[depth])


def block_outputs(
    model: HJEPA,
    encoder_params: Any,
    pixels: Float[Array, "B H W C"],
    blocks: Sequence[int],
) -> list[tuple[Float[Array, "B N D"], Float[Array, "B R D"]]]:
    """Patch and summary tokens after each of the blocks that are asked for.

    Those of the last block are behind the final LayerNorm; of the others, which have none, they are
    standardized.

    Args:
      model: the networks.
      encoder_params: of its encoder, online or EMA.
      pixels: normalised images.
      blocks: numbers from 1 to the encoder's depth.
    """
    apply: Any = model.apply
    encoder, variables = model.context_encoder, {"params": {"context_encoder": encoder_params}}
    if set(blocks) == {encoder.depth}:
        return [apply(variables, pixels, method="encode")] * len(blocks)
    last, found = apply(variables, pixels, method="encode", mutable=["intermediates"])
    outputs = {encoder.depth: last}
    for block in set(blocks) - {encoder.depth}:
        (x,) = found["intermediates"]["context_encoder"][f"tokens_{block - 1}"]
        x = standardize(x)
        outputs[block] = x[:, encoder.num_prefix_tokens :], x[:, : encoder.num_summary_tokens]
    return [outputs[block] for block in blocks]


def _mean(layers: list[Float[Array, "B N D"]]) -> Float[Array, "B N D"]:
    """The mean of the standardized; one stays as it is."""
    if len(layers) == 1:
        return layers[0]
    return jnp.mean(jnp.stack([*map(standardize, layers)]), axis=0)
