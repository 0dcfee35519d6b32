"""The training loss: named terms, each computed only if it has a weight.

References:
  Mo, Tong 2024, arXiv 2410.19560 (C-JEPA: I-JEPA with VICReg). Here variance and covariance are
  those of the summary tokens, unless `loss.regularized` says otherwise.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from hjepa_jax.method import losses
from hjepa_jax.models.hjepa import Prediction


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which terms the loss has, and how they are combined.

    Attributes:
      weights: weight of each term by name, without weights of 0. The names are "level_0" ...
        (prediction of one level), "summary" (all levels, predicted from the summary tokens alone),
        "variance", "covariance", "sigreg", "agreement" and "spread".
      kind: distance of a prediction to its target, one of `losses.PREDICTION_LOSSES`.
      num_slices: random directions per step, for SIGReg.
    """

    weights: Mapping[str, float]
    kind: str = "smooth_l1"
    num_slices: int = 256

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
) -> dict[str, Float[Array, ""]]:
    """Every term of the loss that has a weight, by name, before its weight.

    Args:
      objective: the terms and their weights.
      prediction: output of the online networks.
      targets: by level, aligned with `prediction.levels`. No gradient is stopped here.
      rng: of the directions of SIGReg.
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

    terms = {
        **{f"level_{n}": lambda n=n: distance(prediction.levels, n) for n in objective.levels},
        "summary": summary,
        "variance": lambda: losses.variance_loss(prediction.regularized),
        "covariance": lambda: losses.covariance_loss(prediction.regularized),
        "sigreg": sigreg,
        "agreement": lambda: losses.agreement_loss(prediction.projected),
        "spread": lambda: losses.spread_loss(prediction.projected),
    }
    return {name: terms[name]() for name in objective.weights}


def weighted_sum(
    weights: Mapping[str, float], terms: Mapping[str, Float[Array, ""]]
) -> Float[Array, ""]:
    """The loss: the sum of all terms times their weights."""
    loss = jnp.zeros(())
    for name, weight in weights.items():
        loss += weight * terms[name]
    return loss
