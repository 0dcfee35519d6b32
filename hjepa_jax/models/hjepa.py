"""H-JEPA: a context encoder and a predictor that share one parameter tree."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hjepa_jax.masks.masks import Masks, target_union
from hjepa_jax.models import hierarchy
from hjepa_jax.models.predictor import Predictor
from hjepa_jax.models.projection import Projection
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
      regularized: representations of the image that the regularizer spreads, float32 [B, S, D].
      local_views: the global level, as the summary tokens of each of V local views predict it,
        float32 [I, V, D] for the I images of which B masks are drawn; None without such views or
        without that level.
      projected: float32 [I, B / I + V, K], where all views of an image are to agree, those that
        masks leave of it first; None without a projection.
    """

    levels: tuple[Any, ...]
    summary_levels: tuple[Any, ...]
    query_valid: tuple[Any, ...]
    context: Any
    summary: Any
    context_mean: Any
    regularized: Any
    local_views: Any = None
    projected: Any = None


class HJEPA(nn.Module):
    """The online networks. The target encoder is the same encoder with EMA parameters.

    Attributes:
      context_encoder: ViT over the visible patches.
      predictor: predicts hidden features at every level.
      summary_pass: whether the summary tokens alone must predict everything as well.
      min_coverage: fraction of a cell's patches that must be hidden for it to be predicted.
      regularized: "summary" (each summary token), "context" (mean of the visible tokens), "both".
      projection: of the summary tokens of each view to where all views of an image are to agree.
    """

    context_encoder: VisionTransformer
    predictor: Predictor
    summary_pass: bool = True
    min_coverage: float = 1.0
    regularized: str = "summary"
    projection: Projection | None = None

    def __call__(
        self,
        images: Float[Array, "B H W C"],
        masks: Masks,
        local_views: Float[Array, "I V h w C"] | None = None,
        local_index: Int[Array, "I V P"] | None = None,
    ) -> Prediction:
        """Encodes what is visible and predicts what is not; local views are of I images.

        B is I times the masks per image. Of each local view the encoder sees the patches
        `local_index`, or all of them.
        """
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
        local = None if local_views is None else self.summarize(local_views, local_index)
        predicted = None
        if local is not None and self.predictor.global_level:
            predicted = self.predict_global(local)
        return Prediction(
            levels,
            summary_levels,
            query_valid,
            context,
            summary,
            context_mean,
            regularized,
            predicted,
            None if self.projection is None else self.project(summary, local),
        )

    def summarize(
        self, views: Float[Array, "I V h w C"], index: Int[Array, "I V P"] | None = None
    ) -> Float[Array, "I V R D"]:
        """Summary tokens of each view, of any size: of all its patches or of those of `index`."""
        i, v = views.shape[:2]
        if index is not None:
            index = index.reshape(i * v, -1)
        _, summary = self.context_encoder(views.reshape(i * v, *views.shape[2:]), index)
        return summary.reshape(i, v, *summary.shape[1:])

    def predict_global(self, summary: Float[Array, "I V R D"]) -> Float[Array, "I V D"]:
        """The global level as the summary tokens of each view predict it."""
        i, v, r, d = summary.shape
        seen = jnp.ones((i * v, r), bool)
        tokens = summary.reshape(i * v, r, d)
        (prediction,) = self.predictor(tokens, None, seen, None, (seen[:, :1],))
        return prediction.reshape(i, v, -1)

    def project(
        self, summary: Float[Array, "B R D"], local: Float[Array, "I V R D"] | None
    ) -> Float[Array, "I W K"]:
        """Where the views of an image are to agree: those that masks leave of it, then local."""
        assert self.projection is not None
        num_images = len(summary) if local is None else len(local)
        views = summary.reshape(num_images, -1, *summary.shape[1:])
        if local is not None:
            views = jnp.concatenate([views, local], axis=1)
        return self.projection(views.reshape(*views.shape[:2], -1))

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

        The global query, where there is one, is valid where the image shows something.
        """
        grid_size, num_levels = self.predictor.grid_size, self.predictor.num_levels
        hidden = target_union(masks, grid_size**2)
        cells = (
            hierarchy.hidden_cells(hidden, grid_size, level, self.min_coverage)
            for level in range(1, num_levels)
        )
        shown = jnp.any(masks.context_valid, axis=1, keepdims=True)
        whole = (shown,) * self.predictor.global_level
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
    """Means over the valid tokens; of an image without one, the mean of all other images.

    There it adds nothing to the spread of the batch, which a vector of zeros would.
    """
    weight = valid.astype(jnp.float32)[..., None]
    means = jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
    known = jnp.any(valid, axis=1, keepdims=True)
    middle = jnp.sum(means, axis=0, keepdims=True) / jnp.maximum(jnp.sum(known), 1)
    return jnp.where(known, means, middle)
