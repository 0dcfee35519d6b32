"""Scalars that tell whether a training step is healthy; the loss alone says little."""

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
    """Scalars of a step by metric name. They need no computation that the loss does not need.

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

    It is at most 0 if predictions are no better than the mean of all targets. The loss may be small
    all the same: a part that all targets share makes it small and is worth nothing. 0 without
    queries.
    """
    mask = valid[..., None]
    total = jnp.sum(jnp.where(mask, target, 0.0), axis=(0, 1), keepdims=True)
    mean = total / jnp.maximum(jnp.sum(valid), 1)
    error = jnp.sum(jnp.where(mask, (prediction - target) ** 2, 0.0))
    spread = jnp.sum(jnp.where(mask, (target - mean) ** 2, 0.0))
    return jnp.where(spread > 0, 1.0 - error / jnp.maximum(spread, 1e-12), 0.0)


def position_share(tokens: Float[Array, "B N D"]) -> Float[Array, ""]:
    """The part of the tokens' variance that their place alone decides, in [0, 1].

    The predictor knows the place without looking. If this part grows, a falling loss and a rising
    explained variance say little. Means over B images differ between places by a B-th of the
    tokens' variance even if no place is special. The estimate subtracts this, for B >= 2.
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
    """The part of the tokens' variance that their image alone decides, in [0, 1].

    Any patch of the image tells this part of all others. If it grows, targets of one image draw
    together, and the loss falls because of that. Like `position_share`, it has no bias by the
    number of patches, for N >= 2.
    """
    return position_share(jnp.swapaxes(tokens, 0, 1))


def _mean_std(x: Float[Array, "B D"]) -> Float[Array, ""]:
    """Standard deviation over the batch, averaged over features."""
    return jnp.mean(jnp.std(x, axis=0))
