"""Rows of the protocol "quality": label-free numbers about every representation."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from hjepa_jax.data.base import Split
from hjepa_jax.evaluation import quality
from hjepa_jax.evaluation.collapse import Spread, measure_spread, verdict_beside
from hjepa_jax.evaluation.extraction import LIDAR_VIEWS, Extractor, sample
from hjepa_jax.evaluation.features import EmbedFn, Features
from hjepa_jax.evaluation.protocol import Protocol
from hjepa_jax.runs.scores import Row

QUALITY_ROWS = 10_000  # training images that are used

Place = tuple[str, int | str]  # pool and level


class QualityRows:
    """Makes the rows of the protocol "quality"; does nothing if it is not requested."""

    def __init__(
        self, extract: Extractor, protocol: Protocol, train: Split, embed_views: EmbedFn | None
    ):
        self._extract, self._protocol, self._train = extract, protocol, train
        self._embed_views = embed_views
        self._is_wanted = "quality" in protocol.protocols
        self._untrained: dict[Place, Spread] = {}
        self._views: dict[Place, np.ndarray] = {}

    def measure_untrained(self, encoders: dict[str, Any]) -> dict[str, Features]:
        """Measures the untrained encoder, the reference of the verdicts on the other encoders.

        Returns:
          Its training features by its name, so that they need not be extracted again.
        """
        name = "random_init"
        if not self._is_wanted or name not in encoders:
            return {}
        features = self._extract.features(name, encoders[name], "train", self._train)
        for pool, level, x in self._protocol.representations(features):
            self._untrained[pool, level] = measure_spread(x[sample(len(x), QUALITY_ROWS)])
        return {name: features}

    def extract_views(self, encoder: str, params: Any) -> None:
        """Extracts features of augmented views of the next encoder, for LiDAR."""
        self._views = {}
        if self._is_wanted and encoder != "pixels" and self._embed_views is not None:
            features = self._extract.views(
                self._embed_views, encoder, params, self._train, seed=self._protocol.seed
            )
            self._views = {(p, lv): x for p, lv, x in self._protocol.representations(features)}

    def row(self, encoder: str, pool: str, level: int | str, x: np.ndarray) -> Row:
        """Returns the metrics of one representation; `x` has one row per training image."""
        untrained = None if encoder == "pixels" else self._untrained.get((pool, level))
        x = x[sample(len(x), QUALITY_ROWS)]
        return judge_quality(x, self._views.get((pool, level)), untrained)


def judge_quality(
    features: Float[np.ndarray, "n D"],
    views: Float[np.ndarray, "m D"] | None = None,
    untrained: Spread | None = None,
) -> Row:
    """Returns all label-free metrics of a representation, and whether it has collapsed.

    Args:
      features: features of n images.
      views: features of augmented views, `LIDAR_VIEWS` rows per image; None = no LiDAR.
      untrained: spread of the same representation of the untrained encoder; None = unknown.

    Returns:
      The metrics of `evaluation.quality` by name (None if a value is not finite), the verdict with
      its thresholds, and the 100 largest singular values of the centred features, divided by the
      sum of all.
    """
    sigma = quality.singular_values(features)
    numbers = {
        "feature_std": quality.feature_std(features),
        "rankme": quality.rankme(features),
        "alpha_req": quality.alpha_req(features, spectrum=sigma),
        "uniformity": quality.uniformity(features),
    }
    if views is not None and len(views) >= 2 * LIDAR_VIEWS:
        numbers["lidar"] = quality.lidar(views.reshape(-1, LIDAR_VIEWS, views.shape[1]))
    fields = dataclasses.asdict(verdict_beside(features, untrained, spectrum=sigma))
    return {
        "verdict": fields.pop("label"),
        **fields,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "spectrum": (sigma[:100] / max(sigma.sum(), np.finfo(np.float64).tiny)).tolist(),
        "num_images": len(features),
        "chosen": {},
    }
