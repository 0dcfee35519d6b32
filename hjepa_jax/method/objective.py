"""The training loss: named terms, each computed only if it has a weight.

References:
  Mo, Tong 2024, arXiv 2410.19560 (C-JEPA: I-JEPA with VICReg). Here variance and covariance
  regularize the summary tokens, unless `loss.regularized` says otherwise.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hjepa_jax.method import losses
from hjepa_jax.models.hjepa import Prediction

# Sources of the second moment for the spread; see `Objective.spread_moment`.
SPREAD_MOMENTS = ("batch", "running", "views")
# Share of the old moment in a running one, per batch.
MOMENT_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which terms the loss has, and how they are combined.

    Attributes:
      weights: weight of each term by name, without weights of 0. The names are "level_0" ...
        (prediction of one level), "summary" (all levels, predicted from the summary tokens alone),
        "variance", "covariance", "sigreg", "agreement" and "spread".
      kind: distance of a prediction to its target, one of `losses.PREDICTION_LOSSES`.
      num_slices: random directions per step, for SIGReg.
      teacher_weight: weight of the target encoder's projection in the centre of the agreement.
      spread_moment: second moment that the spread compares: "batch" (one per view), "views" (one
        over all views) or "running" ("views", averaged over batches; see `second_moment`).
    """

    weights: Mapping[str, float]
    kind: str = "smooth_l1"
    num_slices: int = 256
    teacher_weight: float = 0.0
    spread_moment: str = "batch"

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that have a weight, finest first."""
        names = (name for name in self.weights if name.startswith("level_"))
        return tuple(int(name.removeprefix("level_")) for name in names)


def loss_terms(
    objective: Objective,
    prediction: Prediction,
    targets: Mapping[int, Float[Array, "B _ D"]],
    rng: Array,
    moment: Float[Array, "V K K"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Returns each term of the loss that has a weight, by name, not yet multiplied by it.

    Args:
      objective: the terms and their weights.
      prediction: output of the online networks.
      targets: by level, aligned with `prediction.levels`. No gradient is stopped here.
      rng: key for the directions of SIGReg.
      moment: `second_moment` of the projections, for the spread.
    """

    def distance(predictions: Mapping[int, Float[Array, "B _ D"]], level: int) -> Array:
        valid = prediction.query_valid[level]
        return losses.prediction_loss(predictions[level], targets[level], valid, objective.kind)

    def summary() -> Array:
        weighted = jnp.zeros(())
        for level in objective.levels:
            weight = objective.weights[f"level_{level}"]
            weighted += weight * distance(prediction.summary_levels, level)
        return weighted

    def sigreg() -> Array:
        width = prediction.regularized.shape[-1]
        directions = losses.random_directions(rng, objective.num_slices, width)
        return losses.sigreg_loss(prediction.regularized, directions)

    def spread() -> Array:
        assert moment is not None
        return losses.spread_loss(moment)

    terms = {
        **{f"level_{n}": lambda n=n: distance(prediction.levels, n) for n in objective.levels},
        "summary": summary,
        "variance": lambda: losses.variance_loss(prediction.regularized),
        "covariance": lambda: losses.covariance_loss(prediction.regularized),
        "sigreg": sigreg,
        "agreement": lambda: losses.agreement_loss(
            prediction.projected, prediction.projected_target, objective.teacher_weight
        ),
        "spread": spread,
    }
    return {name: terms[name]() for name in objective.weights}


def second_moment(
    objective: Objective, projected: Float[Array, "B V K"] | None, old: Float[Array, "K K"] | None
) -> Float[Array, "_ K K"] | None:
    """The second moment that the spread compares; None if the loss has no spread.

    Args:
      objective: the terms of the loss.
      projected: projections of the views.
      old: the running moment before this batch. The new one is
        0.9 * stop_gradient(old) + 0.1 * (moment of the batch over all views).
    """
    if projected is None or "spread" not in objective.weights:
        return None
    if objective.spread_moment == "batch":
        return losses.second_moment(projected)
    pooled = losses.second_moment(projected.reshape(-1, 1, projected.shape[-1]))
    if objective.spread_moment == "views":
        return pooled
    assert old is not None
    return MOMENT_DECAY * jax.lax.stop_gradient(old)[None] + (1.0 - MOMENT_DECAY) * pooled


def reported_terms(
    objective: Objective, terms: Mapping[str, Float[Array, ""]], projected: Any
) -> dict[str, Float[Array, ""]]:
    """The terms as they are logged: the spread is divided by its floor.

    The floor is the expected spread of independent images if all views of an image have the same
    direction. The moment of a batch averages B directions. A running moment averages as many
    directions as (1 + 0.9) / (1 - 0.9) = 19 batches have.
    """
    if "spread" not in terms:
        return dict(terms)
    num_batches = (1.0 + MOMENT_DECAY) / (1.0 - MOMENT_DECAY)
    num_batches = num_batches if objective.spread_moment == "running" else 1.0
    floor = losses.spread_floor(projected.shape[-1], num_batches * len(projected))
    return {**terms, "spread": terms["spread"] / floor}


def weighted_sum(
    weights: Mapping[str, float], terms: Mapping[str, Float[Array, ""]]
) -> Float[Array, ""]:
    """The loss: the sum of all terms times their weights."""
    loss = jnp.zeros(())
    for name, weight in weights.items():
        loss += weight * terms[name]
    return loss
