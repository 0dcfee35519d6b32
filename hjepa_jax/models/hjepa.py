"""H-JEPA: a context encoder, a predictor and a projection that share one parameter tree."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hjepa_jax.data.sides import pair
from hjepa_jax.masks.masks import Masks, target_union
from hjepa_jax.models import hierarchy
from hjepa_jax.models.predictor import Predictor
from hjepa_jax.models.projection import Projection
from hjepa_jax.models.vit import VisionTransformer

REGULARIZED = ("summary", "context", "both")
PROJECTION_INPUTS = ("summary", "summary+patches")


@struct.dataclass
class Prediction:
    """Output of the online networks for a masked batch.

    Attributes:
      levels: by level, predictions from context and summary tokens, [B, Q_l, D].
      summary_levels: the same from the summary tokens alone; empty without a summary pass.
      query_valid: by level, which predictions count, bool [B, Q_l].
      context: tokens of the visible patches, float32 [B, K, D].
      summary: summary tokens, float32 [B, R, D].
      context_mean: mean of the tokens of the visible patches, float32 [B, D].
      regularized: representations that the regularizer reads, float32 [B, S, D].
      projected: projection of the masked view, then of the V local views, float32
        [B, 1 + V, K]; None without a projection.
      projected_target: projection of the target encoder's features of the whole image, without a
        gradient, float32 [B, 1, K]; None without a teacher.
    """

    levels: dict[int, Any]
    summary_levels: dict[int, Any]
    query_valid: dict[int, Any]
    context: Any
    summary: Any
    context_mean: Any
    regularized: Any
    projected: Any = None
    projected_target: Any = None


@struct.dataclass
class Targets:
    """Output of an encoder for whole images.

    Attributes:
      levels: by level, float32 [B, N_l, D]: LN(A_l z_0), or LN of the pyramid's level l.
      tokens: patch tokens z_0, float32 [B, N, D].
      summary: summary tokens, float32 [B, R, D].
    """

    levels: dict[int, Any]
    tokens: Any
    summary: Any


class HJEPA(nn.Module):
    """The online networks. The target encoder is the same encoder with EMA parameters.

    Attributes:
      context_encoder: ViT over the visible patches.
      predictor: predicts hidden features at every level.
      levels: the levels that are predicted; None = all. If empty, the predictor has no parameters.
      summary_pass: whether the summary tokens alone must predict these levels as well.
      min_coverage: fraction of a cell's patches that must be hidden for it to count in the loss.
      regularized: "summary" (each summary token), "context" (mean of the visible tokens), "both".
      projection: MLP from the features of a view to the space where views are compared; None =
        none.
      projection_input: features of a view that the projection reads: "summary" (summary tokens) or
        "summary+patches" (summary tokens and the mean of the visible patch tokens).
    """

    context_encoder: VisionTransformer
    predictor: Predictor
    levels: tuple[int, ...] | None = None
    summary_pass: bool = True
    min_coverage: float = 1.0
    regularized: str = "summary"
    projection: Projection | None = None
    projection_input: str = "summary"

    @property
    def predicted_levels(self) -> tuple[int, ...]:
        """The levels that are predicted, finest first."""
        return tuple(range(self.predictor.num_levels)) if self.levels is None else self.levels

    def __call__(
        self,
        images: Float[Array, "B H W C"],
        masks: Masks,
        local_views: Float[Array, "B V h w C"] | None = None,
        local_index: Int[Array, "B V P"] | None = None,
        teacher: Targets | None = None,
    ) -> Prediction:
        """Encodes the visible patches and predicts the hidden ones.

        Args:
          images: normalised pixels.
          masks: which patches are visible and which are predicted.
          local_views: further crops of the images, of any size.
          local_index: the patches of each local view that the encoder sees; None = all.
          teacher: features of the whole images by the target encoder; None = not projected.
        """
        context, summary = self.context_encoder(images, masks.context_index, masks.context_valid)
        query_valid = self.query_valid(masks)
        levels, summary_levels = {}, {}
        if query_valid:
            summary_valid = jnp.ones(summary.shape[:2], bool)
            levels = self._predict(
                masks,
                query_valid,
                context=jnp.concatenate([summary, context], axis=1),
                context_valid=jnp.concatenate([summary_valid, masks.context_valid], axis=1),
                context_index=masks.context_index,
            )
            if self.summary_pass:
                summary_levels = self._predict(
                    masks, query_valid, context=summary, context_valid=summary_valid
                )
        context_mean = _valid_mean(context, masks.context_valid)
        regularized = {
            "summary": summary,
            "context": context_mean[:, None],
            "both": jnp.concatenate([summary, context_mean[:, None]], axis=1),
        }[self.regularized]
        projected = projected_target = None
        if self.projection is not None:
            views = self._view_features(summary, context_mean)[:, None]
            if local_views is not None:
                local = self._encode_local(local_views, local_index)
                views = jnp.concatenate([views, local], axis=1)
            projected = self.projection(views)
            if teacher is not None:
                whole = self._view_features(teacher.summary, jnp.mean(teacher.tokens, axis=1))
                projected_target = jax.lax.stop_gradient(self.projection(whole[:, None]))
        return Prediction(
            levels=levels,
            summary_levels=summary_levels,
            query_valid=query_valid,
            context=context,
            summary=summary,
            context_mean=context_mean,
            regularized=regularized,
            projected=projected,
            projected_target=projected_target,
        )

    def _predict(
        self, masks: Masks, query_valid: dict[int, Bool[Array, "B _"]], **context: Any
    ) -> dict[int, Float[Array, "B _ D"]]:
        """The predictor's output from some context tokens, through the pyramid if there is one."""
        target_index = masks.target_index.reshape(len(masks.target_index), -1)
        levels = self.predictor(
            target_index=target_index,
            query_valid=query_valid,
            num_blocks=masks.target_index.shape[1],
            **context,
        )
        return self._fuse(levels, target_index)

    def _view_features(
        self, summary: Float[Array, "B R D"], mean: Float[Array, "B D"]
    ) -> Float[Array, "B E"]:
        """The features of a view that the projection reads, concatenated."""
        flat = summary.reshape(len(summary), -1)
        if self.projection_input == "summary":
            return flat
        return jnp.concatenate([flat, mean], axis=1)

    def _encode_local(
        self, views: Float[Array, "B V h w C"], index: Int[Array, "B V P"] | None
    ) -> Float[Array, "B V E"]:
        """The features of each local view that the projection reads."""
        b, v = views.shape[:2]
        if index is not None:
            index = index.reshape(b * v, -1)
        tokens, summary = self.context_encoder(views.reshape(b * v, *views.shape[2:]), index)
        return self._view_features(summary, jnp.mean(tokens, axis=1)).reshape(b, v, -1)

    def _fuse(
        self,
        levels: dict[int, Float[Array, "B _ D"]],
        target_index: Int[Array, "B Q"] | None = None,
    ) -> dict[int, Float[Array, "B _ D"]]:
        """Passes the levels through the pyramid, if there is one."""
        if self.context_encoder.pyramid is None:
            return levels
        fused = self.context_encoder.pyramid(tuple(levels.values()), target_index)
        return dict(zip(levels, fused, strict=True))

    def query_valid(self, masks: Masks) -> dict[int, Bool[Array, "B _"]]:
        """Queries that count, by level: at level 0 the real targets, above the hidden cells."""
        grid_size = self.predictor.grid_size
        hidden = target_union(masks, math.prod(pair(grid_size)))
        return {
            level: hierarchy.hidden_cells(hidden, grid_size, level, self.min_coverage)
            if level
            else masks.target_valid.reshape(len(hidden), -1)
            for level in self.predicted_levels
        }

    def encode(
        self,
        images: Float[Array, "B H W C"],
        index: Int[Array, "B K"] | None = None,
        valid: Bool[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B _ D"], Float[Array, "B R D"]]:
        """Patch and summary tokens of whole images, or of the patches `index`."""
        return self.context_encoder(images, index, valid)

    def targets(self, images: Float[Array, "B H W C"]) -> Targets:
        """Features of whole images at every predicted level, with the bound encoder parameters."""
        tokens, summary = self.context_encoder(images)
        grid_size = self.predictor.grid_size
        levels = {
            level: hierarchy.standardize(hierarchy.pool(tokens, grid_size, level))
            for level in self.predicted_levels
        }
        if self.context_encoder.pyramid is not None:
            levels = {level: hierarchy.standardize(x) for level, x in self._fuse(levels).items()}
        return Targets(levels, tokens, summary)


def _valid_mean(x: Float[Array, "B K D"], valid: Bool[Array, "B K"]) -> Float[Array, "B D"]:
    """Mean over the valid tokens; an image without valid tokens gets the mean of the other images.

    So it adds nothing to the variance of the batch. A vector of zeros would.
    """
    weight = valid.astype(jnp.float32)[..., None]
    means = jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
    known = jnp.any(valid, axis=1, keepdims=True)
    middle = jnp.sum(means, axis=0, keepdims=True) / jnp.maximum(jnp.sum(known), 1)
    return jnp.where(known, means, middle)
