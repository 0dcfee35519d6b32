"""What a training step says of its health, beside its loss, which alone says little."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hjepa_jax.method import losses
from hjepa_jax.models.hjepa import Prediction


def health(
    prediction: Prediction,
    targets: tuple[Float[Array, "K _ D"], ...],
    tokens: Float[Array, "B N D"],
    *,
    num_levels: int,
) -> dict[str, Float[Array, ""]]:
    """Scalars of a step by metric name.

    Args:
      prediction: output of the online networks.
      targets: aligned with `prediction.levels`, of each of K masks.
      tokens: of the target encoder, in the order of the grid.
      num_levels: L; of the global level, if there is one, nothing is said.
    """
    aligned = (prediction.levels, targets, prediction.query_valid)
    queries = [*zip(*(x[:num_levels] for x in aligned), strict=True)]
    finest_prediction, finest, finest_valid = queries[0]
    cosine = losses.cosine_similarity(finest_prediction, finest)
    scalars = {
        "context_std": _mean_std(prediction.context_mean),
        "target_std": _mean_std(jnp.mean(tokens, axis=1)),
        "pred_target_cosine": losses.masked_mean(cosine, finest_valid),
        "position_share": position_share(tokens),
        "image_share": image_share(tokens),
    }
    for level, query in enumerate(queries):
        scalars[f"num_targets_level_{level}"] = jnp.sum(query[2]) / len(tokens)
        scalars[f"explained_variance_level_{level}"] = explained_variance(*query)
    if prediction.summary_levels:
        share = explained_variance(prediction.summary_levels[0], finest, finest_valid)
        scalars["explained_variance_summary"] = share
    return scalars


def explained_variance(
    prediction: Float[Array, "B Q D"], target: Float[Array, "B Q D"], valid: Bool[Array, "B Q"]
) -> Float[Array, ""]:
    """R^2 over the valid queries: 1 - sum |p - t|^2 / sum |t - mean t|^2, at most 1.

    At most 0 where predictions are no better than the mean of all targets, however small the loss
    is: a part that all targets share makes it small and is worth nothing. 0 without queries.
    """
    mask = valid[..., None]
    total = jnp.sum(jnp.where(mask, target, 0.0), axis=(0, 1), keepdims=True)
    mean = total / jnp.maximum(jnp.sum(valid), 1)
    error = jnp.sum(jnp.where(mask, (prediction - target) ** 2, 0.0))
    spread = jnp.sum(jnp.where(mask, (target - mean) ** 2, 0.0))
    return jnp.where(spread > 0, 1.0 - error / jnp.maximum(spread, 1e-12), 0.0)


def position_share(tokens: Float[Array, "B N D"]) -> Float[Array, ""]:
    """The part of the tokens' variance that their place alone decides, in [0, 1].

    The predictor knows it without looking; where it grows, a falling loss and a rising explained
    variance say little. The estimate has no bias by the number of images, for B >= 2: the means of
    B images at places that nothing distinguishes still differ by a B-th of the tokens' variance.
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

    Whatever the place: any patch of the image tells it of all others. Where it grows, targets of
    one image draw together, and the loss falls for that. As `position_share`, without a bias by
    the number of patches, for N >= 2.
    """
    return position_share(jnp.swapaxes(tokens, 0, 1))


def _mean_std(x: Float[Array, "B D"]) -> Float[Array, ""]:
    """Standard deviation over the batch, averaged over features."""
    return jnp.mean(jnp.std(x, axis=0))
