"""What is predicted: features that the target encoder has of whole images, at every level."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from hjepa_jax.models.hierarchy import global_feature, pool, standardize
from hjepa_jax.models.hjepa import HJEPA

# Per level, finest first, then for the global one: the blocks, from 1, whose mean it is made of.
TargetDepths = tuple[tuple[int, ...], ...]
# What the global level is the mean of.
WHOLES = ("patches", "summary")


@dataclasses.dataclass(frozen=True)
class TargetSpec:
    """What targets are made of.

    Attributes:
      depths: blocks of the target encoder (`target_depths`).
      whole: the global level: "patches", the mean of all patch tokens; "summary", of the summary
        tokens, which then are what they have to predict of other views.
    """

    depths: TargetDepths
    whole: str = "patches"


@struct.dataclass
class Targets:
    """Features of B images.

    Attributes:
      levels: L arrays float32 [B, N_l, D], finest first: LN(A_l z_l), or LN of what the pyramid
        makes of them. z_l is the output of the encoder, where no other blocks are chosen.
      whole: the global level, LN of the mean of patch or summary tokens, float32 [B, 1, D].
      tokens: output of the encoder, float32 [B, N, D].
    """

    levels: tuple[Any, ...]
    whole: Any
    tokens: Any


def target_depths(
    depth: int,
    num_levels: int,
    *,
    num_layers: int = 1,
    level_depths: Sequence[int] | None = None,
) -> TargetDepths:
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
    model: HJEPA, encoder_params: Any, pixels: Float[Array, "B H W C"], spec: TargetSpec
) -> Targets:
    """Targets of every level.

    Args:
      model: the networks.
      encoder_params: of its encoder, online or EMA.
      pixels: normalised images.
      spec: what the targets are made of.
    """
    last, grid_size = model.context_encoder.depth, model.predictor.grid_size
    wanted = {last, *(depth for level in spec.depths for depth in level)}
    outputs = block_outputs(model, encoder_params, pixels, wanted)
    *mixed, whole = (_mean([outputs[depth][0] for depth in level]) for level in spec.depths)
    if spec.whole == "summary":
        whole = _mean([outputs[depth][1] for depth in spec.depths[-1]])
    levels = tuple(standardize(pool(z, grid_size, level)) for level, z in enumerate(mixed))
    whole = global_feature(whole)
    if model.context_encoder.pyramid is not None:
        apply: Any = model.apply
        variables = {"params": {"context_encoder": encoder_params}}
        levels = tuple(map(standardize, apply(variables, levels, method="fuse_levels")))
    return Targets(levels, whole, outputs[last][0])


def block_outputs(
    model: HJEPA, encoder_params: Any, pixels: Float[Array, "B H W C"], blocks: Collection[int]
) -> dict[int, tuple[Float[Array, "B N D"], Float[Array, "B R D"]]]:
    """Patch and summary tokens after each of the encoder's blocks that are asked for.

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
        return {encoder.depth: apply(variables, pixels, method="encode")}
    last, found = apply(variables, pixels, method="encode", mutable=["intermediates"])
    outputs = {encoder.depth: last}
    for block in set(blocks) - {encoder.depth}:
        (x,) = found["intermediates"]["context_encoder"][f"tokens_{block - 1}"]
        x = standardize(x)
        outputs[block] = x[:, encoder.num_prefix_tokens :], x[:, : encoder.num_summary_tokens]
    return outputs


def _mean(layers: list[Float[Array, "B N D"]]) -> Float[Array, "B N D"]:
    """The mean of the standardized; one stays as it is."""
    if len(layers) == 1:
        return layers[0]
    return jnp.mean(jnp.stack([*map(standardize, layers)]), axis=0)
