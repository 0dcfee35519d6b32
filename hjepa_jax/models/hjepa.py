"""H-JEPA: a context encoder and a predictor that share one parameter tree."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hjepa_jax.masking import Masks, target_union
from hjepa_jax.models import hierarchy
from hjepa_jax.models.predictor import Predictor
from hjepa_jax.models.products import Dense, Precision
from hjepa_jax.models.vit import VisionTransformer

REGULARIZED = ("summary", "context", "both")


@struct.dataclass
class Prediction:
    """What the online networks make of a masked batch.

    Attributes:
      levels: per level, predictions from context and summary tokens, [B, Q_l, D]; after the L
        levels that of the global one, [B, 1, D], where the predictor has it.
      summary_levels: the same from the summary tokens alone; empty without a summary pass.
      query_valid: per level, which predictions count, bool [B, Q_l].
      context: tokens of the visible patches, float32 [B, K, D].
      summary: summary tokens, float32 [B, R, D].
      context_mean: mean of the tokens of the visible patches, float32 [B, D].
      regularized: representations of the image that the regularizer spreads, float32 [B, S, E].
      local_views: the global level, as the summary tokens of each of V local views predict it,
        float32 [B, V, D]; None without such views.
    """

    levels: tuple[Any, ...]
    summary_levels: tuple[Any, ...]
    query_valid: tuple[Any, ...]
    context: Any
    summary: Any
    context_mean: Any
    regularized: Any
    local_views: Any = None


class Expander(nn.Module):
    """An MLP between the encoder and the regularizer, thrown away after training.

    Spreading its output needs many different things of its input, but not that the input itself be
    spread: what the encoder says stays usable by a linear probe.

    References:
      Bardes, Ponce, LeCun 2022, arXiv 2105.04906, section 4.1, where it is far wider; one hidden
      layer here, without batch normalisation.
    """

    width: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S E"]:
        x = nn.gelu(Dense(self.width, self.precision, name="hidden")(x), approximate=True)
        return Dense(self.width, self.precision, name="out")(x).astype(jnp.float32)


class HJEPA(nn.Module):
    """The online networks. The target encoder is the same encoder with EMA parameters.

    Attributes:
      context_encoder: ViT over the visible patches.
      predictor: predicts hidden features at every level.
      summary_pass: whether the summary tokens alone must predict everything as well.
      min_coverage: fraction of a cell's patches that must be hidden for it to be predicted.
      regularized: "summary" (each summary token), "context" (mean of the visible tokens), "both".
      expander: between those and the regularizer; None for nothing.
    """

    context_encoder: VisionTransformer
    predictor: Predictor
    summary_pass: bool = True
    min_coverage: float = 1.0
    regularized: str = "summary"
    expander: Expander | None = None

    def __call__(
        self,
        images: Float[Array, "B H W C"],
        masks: Masks,
        local_views: Float[Array, "B V h w C"] | None = None,
    ) -> Prediction:
        """Encodes what is visible and predicts what is not."""
        context, summary = self.context_encoder(images, masks.context_index, masks.context_valid)
        b, r, _ = summary.shape
        num_blocks = masks.target_index.shape[1]
        target_index = masks.target_index.reshape(b, -1)
        query_valid = self.query_valid(masks)
        summary_valid = jnp.ones((b, r), bool)

        levels = self.predictor(
            jnp.concatenate([summary, context], axis=1),
            masks.context_index,
            jnp.concatenate([summary_valid, masks.context_valid], axis=1),
            target_index,
            query_valid,
            num_blocks=num_blocks,
        )
        levels = self.fuse_levels(levels, target_index)
        summary_levels = ()
        if self.summary_pass:
            summary_levels = self.predictor(
                summary, None, summary_valid, target_index, query_valid, num_blocks=num_blocks
            )
            summary_levels = self.fuse_levels(summary_levels, target_index)
        context_mean = _valid_mean(context, masks.context_valid)
        regularized = {
            "summary": summary,
            "context": context_mean[:, None],
            "both": jnp.concatenate([summary, context_mean[:, None]], axis=1),
        }[self.regularized]
        if self.expander is not None:
            regularized = self.expander(regularized)
        return Prediction(
            levels,
            summary_levels,
            query_valid,
            context,
            summary,
            context_mean,
            regularized,
            None if local_views is None else self.predict_global(local_views),
        )

    def predict_global(self, views: Float[Array, "B V h w C"]) -> Float[Array, "B V D"]:
        """The global level as the summary tokens of each whole view, of any size, predict it."""
        b, v = views.shape[:2]
        _, summary = self.context_encoder(views.reshape(b * v, *views.shape[2:]))
        seen = jnp.ones(summary.shape[:2], bool)
        (prediction,) = self.predictor(summary, None, seen, None, (seen[:, :1],))
        return prediction.reshape(b, v, -1)

    def fuse_levels(
        self,
        levels: tuple[Float[Array, "B _ D"], ...],
        target_index: Int[Array, "B Q"] | None = None,
    ) -> tuple[Float[Array, "B _ D"], ...]:
        """The levels through the pyramid, if there is one; a global one stays as it is."""
        if self.context_encoder.pyramid is None:
            return levels
        num_levels = self.predictor.num_levels
        fused = self.context_encoder.pyramid(levels[:num_levels], target_index)
        return (*fused, *levels[num_levels:])

    def query_valid(self, masks: Masks) -> tuple[Bool[Array, "B _"], ...]:
        """Which level-0 targets are real, then which cells of each level above are hidden.

        The global query, where there is one, is always valid.
        """
        grid_size, num_levels = self.predictor.grid_size, self.predictor.num_levels
        hidden = target_union(masks, grid_size**2)
        cells = (
            hierarchy.hidden_cells(hidden, grid_size, level, self.min_coverage)
            for level in range(1, num_levels)
        )
        whole = (jnp.ones((len(hidden), 1), bool),) * self.predictor.global_level
        return (masks.target_valid.reshape(len(hidden), -1), *cells, *whole)

    def encode(
        self,
        images: Float[Array, "B H W C"],
        index: Int[Array, "B K"] | None = None,
        valid: Bool[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B _ D"], Float[Array, "B R D"]]:
        """Patch and summary tokens of whole images (or of the patches `index`)."""
        return self.context_encoder(images, index, valid)


def _valid_mean(x: Float[Array, "B K D"], valid: Bool[Array, "B K"]) -> Float[Array, "B D"]:
    weight = valid.astype(jnp.float32)[..., None]
    return jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)


def target_levels(
    model: HJEPA, encoder_params: Any, tokens: Float[Array, "B N D"]
) -> tuple[Float[Array, "B _ D"], ...]:
    """What each level's targets are: LN(A_l z_0), or LN of what the pyramid makes of them.

    Args:
      model: the networks.
      encoder_params: of its encoder, online or EMA.
      tokens: z_0 of the whole grid.

    Returns:
      L arrays [B, N_l, D], finest first.
    """
    grid_size, num_levels = model.predictor.grid_size, model.predictor.num_levels
    levels = hierarchy.level_features(tokens, grid_size, num_levels)
    if model.context_encoder.pyramid is None:
        return levels
    apply: Any = model.apply
    variables = {"params": {"context_encoder": encoder_params}}
    return tuple(map(hierarchy.standardize, apply(variables, levels, method="fuse_levels")))


def last_layers(
    model: HJEPA, encoder_params: Any, pixels: Float[Array, "B H W C"], num_layers: int
) -> list[tuple[Float[Array, "B N D"], Float[Array, "B R D"]]]:
    """Patch and summary tokens after each of the encoder's last blocks, the last one first.

    Those of the last block are behind the final LayerNorm; of the others, which have none, the
    summary tokens are standardized.

    Args:
      model: the networks.
      encoder_params: of its encoder, online or EMA.
      pixels: normalised images.
      num_layers: how many blocks, at most all.
    """
    apply: Any = model.apply
    encoder, variables = model.context_encoder, {"params": {"context_encoder": encoder_params}}
    if num_layers == 1:
        return [apply(variables, pixels, method="encode")]
    last, found = apply(variables, pixels, method="encode", mutable=["intermediates"])
    layers = [last]
    for i in range(encoder.depth - 2, encoder.depth - 1 - num_layers, -1):
        (x,) = found["intermediates"]["context_encoder"][f"tokens_{i}"]
        summary = hierarchy.standardize(x[:, : encoder.num_summary_tokens])
        layers.append((x[:, encoder.num_prefix_tokens :].astype(jnp.float32), summary))
    return layers
