"""Scalars that show whether training is healthy. The loss alone cannot show it."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hjepa_jax.method import losses
from hjepa_jax.models.hjepa import Prediction


def health(
    prediction: Prediction,
    targets: Mapping[int, Float[Array, "B _ D"]],
    tokens: Float[Array, "B N D"] | None,
) -> dict[str, Float[Array, ""]]:
    """Scalars of a step by metric name, computed from the outputs that the loss uses as well.

    Args:
      prediction: output of the online networks.
      targets: by level, aligned with `prediction.levels`.
      tokens: patch tokens of the target encoder; None if no term of the loss needs them.
    """
    scalars = {"context_std": _mean_std(prediction.context_mean)}
    if tokens is not None:
        scalars["target_std"] = _mean_std(jnp.mean(tokens, axis=1))
        scalars["position_share"] = position_share(tokens)
        scalars["image_share"] = image_share(tokens)
    for level, predicted in prediction.levels.items():
        valid = prediction.query_valid[level]
        scalars[f"num_targets_level_{level}"] = jnp.sum(valid) / len(valid)
        share = explained_variance(predicted, targets[level], valid)
        scalars[f"explained_variance_level_{level}"] = share
    if prediction.levels:
        finest = min(prediction.levels)
        target, valid = targets[finest], prediction.query_valid[finest]
        cosine = losses.cosine_similarity(prediction.levels[finest], target)
        scalars["pred_target_cosine"] = losses.masked_mean(cosine, valid)
        if prediction.summary_levels:
            share = explained_variance(prediction.summary_levels[finest], target, valid)
            scalars["explained_variance_summary"] = share
    return scalars


def explained_variance(
    prediction: Float[Array, "B Q D"], target: Float[Array, "B Q D"], valid: Bool[Array, "B Q"]
) -> Float[Array, ""]:
    """R^2 over the valid queries: 1 - sum |p - t|^2 / sum |t - mean t|^2, at most 1.

    It is at most 0 if the predictions are no better than the mean of all targets. The loss can be
    small even then: it is small as soon as the predictor knows the part that all targets share.
    0 without valid queries.
    """
    mask = valid[..., None]
    total = jnp.sum(jnp.where(mask, target, 0.0), axis=(0, 1), keepdims=True)
    mean = total / jnp.maximum(jnp.sum(valid), 1)
    error = jnp.sum(jnp.where(mask, (prediction - target) ** 2, 0.0))
    spread = jnp.sum(jnp.where(mask, (target - mean) ** 2, 0.0))
    return jnp.where(spread > 0, 1.0 - error / jnp.maximum(spread, 1e-12), 0.0)


def position_share(tokens: Float[Array, "B N D"]) -> Float[Array, ""]:
    """The share of the tokens' variance that the position alone explains, in [0, 1].

    The predictor knows the position without any context. If this share grows, a falling loss and a
    rising explained variance prove little. Even if positions do not matter, means over B images
    vary between positions by 1/B of the tokens' variance. For B >= 2 the estimate subtracts this.
    """
    b = len(tokens)
    at_place = jnp.mean(tokens, axis=0, keepdims=True)
    of_image = tokens - at_place
    within = of_image - jnp.mean(of_image, axis=1, keepdims=True)
    between = jnp.mean((at_place - jnp.mean(at_place, axis=1, keepdims=True)) ** 2)
    of_place = jnp.maximum(between - jnp.mean(within**2) / max(b - 1, 1), 0.0)
    total = of_place + jnp.mean(of_image**2) * (b / max(b - 1, 1))
    return of_place / jnp.maximum(total, 1e-12)


def image_share(tokens: Float[Array, "B N D"]) -> Float[Array, ""]:
    """The share of the tokens' variance that the image alone explains, in [0, 1].

    Any patch of an image reveals this part of all its other patches. If the share grows, the
    targets of an image become alike, and the loss falls for that reason only. As in
    `position_share`, the bias from the finite number of patches is removed, for N >= 2.
    """
    return position_share(jnp.swapaxes(tokens, 0, 1))


def _mean_std(x: Float[Array, "B D"]) -> Float[Array, ""]:
    """Standard deviation over the batch, averaged over features."""
    return jnp.mean(jnp.std(x, axis=0))
