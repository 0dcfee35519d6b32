"""The features of an encoder that probes read."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from hjepa_jax.method.targets import block_outputs
from hjepa_jax.models import hierarchy
from hjepa_jax.models.hjepa import HJEPA


def make_embed_fn(
    model: HJEPA, preprocess: Callable[..., Float[Array, "B S S C"]], *, num_layers: int = 1
) -> Callable[..., dict[str, Float[Array, "B _"]]]:
    """Returns `embed(encoder_params, images, *rngs)`: the features that probes read.

    The result holds, per image, `level_{l}` [B, n * D] (mean over the cells of LN(A_l z_0), the
    very quantity that level l predicts, unless other blocks or a pyramid make its target) and
    `summary` [B, R * n * D] (the summary tokens, concatenated).

    Args:
      model: the networks whose encoder is used.
      preprocess: `preprocess(images, *rngs)`, from stored images to normalised pixels; refuses
        images of another type.
      num_layers: n, how many of the last blocks give features. 1 is the output of the encoder;
        of the blocks before the last, tokens are standardised, for they have no final LayerNorm.
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
