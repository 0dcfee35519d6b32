"""The features of an encoder that probes read."""

from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from hjepa_jax.models import hierarchy
from hjepa_jax.models.hierarchy import standardize
from hjepa_jax.models.hjepa import HJEPA


def make_embed_fn(
    model: HJEPA, preprocess: Callable[..., Float[Array, "B S S C"]], *, num_layers: int = 1
) -> Callable[..., dict[str, Float[Array, "B _"]]]:
    """Returns `embed(encoder_params, images, *rngs)`: the features that probes read.

    The result has these entries:
      `level_{l}` [B, n * D]: LN(A_l z_0), averaged over the cells. Without a pyramid, LN(A_l z_0)
        is also the target of level l.
      `summary` [B, R * n * D]: the summary tokens, concatenated; missing if R = 0.

    Args:
      model: the networks; only the encoder is used.
      preprocess: `preprocess(images, *rngs)`, from stored images to normalised pixels. It raises
        an error for images of another type.
      num_layers: n, number of the last blocks that give features. 1 = the output of the encoder.
        Tokens of earlier blocks are standardised, because they have no final LayerNorm.
    """
    grid_size, num_levels = model.predictor.grid_size, model.predictor.num_levels
    depth = model.context_encoder.depth

    def embed(
        encoder_params: Any, images: Shaped[Array, "B H W C"], *rngs: Array
    ) -> dict[str, Float[Array, "B _"]]:
        pixels = preprocess(images, *rngs)
        blocks = range(depth, depth - num_layers, -1)
        outputs = block_outputs(model, encoder_params, pixels, blocks)
        layers = [outputs[block] for block in blocks]
        means = [
            [jnp.mean(x, axis=1) for x in hierarchy.level_features(tokens, grid_size, num_levels)]
            for tokens, _ in layers
        ]
        features = {
            f"level_{level}": jnp.concatenate([layer[level] for layer in means], axis=-1)
            for level in range(num_levels)
        }
        if model.context_encoder.num_summary_tokens:
            summaries = [summary.reshape(images.shape[0], -1) for _, summary in layers]
            features["summary"] = jnp.concatenate(summaries, axis=-1)
        return features

    return embed


def block_outputs(
    model: HJEPA, encoder_params: Any, pixels: Float[Array, "B H W C"], blocks: Collection[int]
) -> dict[int, tuple[Float[Array, "B N D"], Float[Array, "B R D"]]]:
    """Returns patch and summary tokens after each of the requested blocks of the encoder.

    Tokens of the last block have passed the final LayerNorm. Tokens of earlier blocks are
    standardized instead.

    Args:
      model: the networks.
      encoder_params: parameters of the encoder, online or EMA.
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
