"""The training loss: what is predicted against its targets, and what keeps features apart.

References:
  Mo, Tong 2024, arXiv 2410.19560 (C-JEPA: I-JEPA with VICReg). Variance and covariance are here of
  the summary tokens unless `loss.regularized` says otherwise; the invariance of the means of two
  views is the global level, where its target is of a second view (`loss.cross_view`): there a
  distance through the predictor, not of the two means themselves.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from hjepa_jax.method import losses
from hjepa_jax.models.hjepa import Prediction


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """How the pieces of the loss are combined.

    Attributes:
      kind: distance of a prediction to its target, one of `losses.PREDICTION_LOSSES`.
      level_weights: w_l of each level, in both passes.
      summary_weight: weight of the summary pass.
      variance_weight, covariance_weight: weights of the VICReg terms (0 and 0: none).
      sigreg_weight: weight of SIGReg (0: none).
      global_terms: names and weights of the terms of the global level, where the model has it:
        "loss_global", whose target is of the same view, and "loss_cross_view", of a second one.
      local_weight: weight of what the local views predict of the global level, if there are any.
      agreement_weight: weight of the agreement of an image's views, where they are projected.
      spread_weight: weight of what keeps the projected views of different images apart.
      num_slices: random directions per step, of SIGReg.
    """

    kind: str = "smooth_l1"
    level_weights: tuple[float, ...] = (1.0,)
    summary_weight: float = 1.0
    variance_weight: float = 0.0
    covariance_weight: float = 0.0
    sigreg_weight: float = 0.0
    num_slices: int = 256
    global_terms: tuple[tuple[str, float], ...] = ()
    local_weight: float = 1.0
    agreement_weight: float = 0.0
    spread_weight: float = 0.0


def hjepa_loss(
    prediction: Prediction,
    targets: tuple[Float[Array, "B _ D"], ...],
    weights: LossWeights,
    rng: Array,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The training loss: what is predicted of each level, by all and by part, and the regularizer.

      sum_l w_l d_l + summary_weight * (the same, from the summary tokens)
        + local_weight * (the global level, from local views) + regularizer
        + agreement_weight * agreement + spread_weight * spread

    Args:
      prediction: output of the online networks.
      targets: per level, features aligned with `prediction.levels`; no gradient is stopped here.
      weights: how the terms are combined.
      rng: of the directions that SIGReg looks along.

    Returns:
      The loss, and every term of it by its metric name, before its own weight.
    """
    num_more = len(targets) - len(prediction.levels)  # the global prediction may have two targets

    def level_losses(predictions: tuple[Array, ...]) -> list[Array]:
        predictions, valid = (x + x[-1:] * num_more for x in (predictions, prediction.query_valid))
        triples = zip(predictions, targets, valid, strict=True)
        return [losses.prediction_loss(p, t, v, weights.kind) for p, t, v in triples]

    term_weights = {f"loss_level_{level}": w for level, w in enumerate(weights.level_weights)}
    term_weights |= dict(weights.global_terms)

    def weighted(values: list[Array]) -> Array:
        return sum(
            (w * v for w, v in zip(term_weights.values(), values, strict=True)),
            start=jnp.zeros(()),
        )

    level_values = level_losses(prediction.levels)
    terms = dict(zip(term_weights, level_values, strict=True))
    loss = weighted(level_values)
    if prediction.summary_levels:
        terms["loss_summary"] = weighted(level_losses(prediction.summary_levels))
        loss += weights.summary_weight * terms["loss_summary"]
    if prediction.local_views is not None:
        terms["loss_local"] = local_loss(prediction.local_views, targets, weights)
        loss += weights.local_weight * terms["loss_local"]
    if weights.variance_weight or weights.covariance_weight:
        terms["loss_variance"] = losses.variance_loss(prediction.regularized)
        terms["loss_covariance"] = losses.covariance_loss(prediction.regularized)
        loss += weights.variance_weight * terms["loss_variance"]
        loss += weights.covariance_weight * terms["loss_covariance"]
    if weights.sigreg_weight:
        width = prediction.regularized.shape[-1]
        directions = losses.random_directions(rng, weights.num_slices, width)
        terms["loss_sigreg"] = losses.sigreg_loss(prediction.regularized, directions)
        loss += weights.sigreg_weight * terms["loss_sigreg"]
    if prediction.projected is not None:
        terms["loss_agreement"] = losses.agreement_loss(prediction.projected)
        terms["loss_spread"] = losses.spread_loss(prediction.projected)
        loss += weights.agreement_weight * terms["loss_agreement"]
        loss += weights.spread_weight * terms["loss_spread"]
    return loss, {"loss": loss, **terms}


def local_loss(
    predictions: Float[Array, "B V D"],
    targets: tuple[Float[Array, "K _ D"], ...],
    weights: LossWeights,
) -> Float[Array, ""]:
    """What every local view predicts, against each of the global targets by its share."""
    shares = [share for _, share in weights.global_terms]
    loss = jnp.zeros(())
    for share, target in zip(shares, targets[-len(shares) :], strict=True):
        target = target[:: len(target) // len(predictions)]  # once per image, not per mask
        target = jnp.broadcast_to(target, predictions.shape)
        error = losses.elementwise_loss(predictions, target, weights.kind)
        loss += share * jnp.mean(error)
    return loss
