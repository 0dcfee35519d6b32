"""Extracts the features of the encoders under evaluation, or reads them from the cache."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from hjepa_jax.data.base import Split
from hjepa_jax.data.rows import draw_rows
from hjepa_jax.evaluation.feature_cache import FeatureCache
from hjepa_jax.evaluation.features import EmbedFn, Features, embed_pixels, extract_features

# LiDAR compares this many augmented views of this many training images.
LIDAR_IMAGES, LIDAR_VIEWS = 1000, 5


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Extracts features by encoder and split.

    Attributes:
      embed: `embed(encoder_params, uint8 images)`, a dict of features by name.
      batch_size: images per call.
      cache: storage for features; None = none.
      embed_raw: the same function for the raw-pixel baseline.
    """

    embed: EmbedFn
    batch_size: int
    cache: FeatureCache | None
    embed_raw: EmbedFn = embed_pixels

    def features(self, encoder: str, params: Any, name: str, split: Split) -> Features:
        """Returns the features of a split; `name` is "train" or "test"."""
        if encoder == "pixels":  # faster to compute than to read
            embed = jax.jit(self.embed_raw)
            return extract_features(embed, params, split.images, batch_size=self.batch_size)
        what = f"{encoder} features, {name}"
        return self._stored(f"{encoder}_{name}", what, self.embed, params, split.images)

    def views(
        self, embed_views: EmbedFn, encoder: str, params: Any, split: Split, *, seed: int
    ) -> Features:
        """Returns features of augmented views; the `LIDAR_VIEWS` rows of an image are adjacent."""
        images = np.repeat(
            split.images[sample(len(split.images), LIDAR_IMAGES)], LIDAR_VIEWS, axis=0
        )
        rngs = np.asarray(jax.random.split(jax.random.PRNGKey(seed), len(images)))
        what = f"{encoder} features, augmented views"
        return self._stored(f"{encoder}_views", what, embed_views, params, images, rngs)

    def _stored(
        self, name: str, what: str, embed: EmbedFn, params: Any, *arrays: np.ndarray
    ) -> Features:
        jitted = jax.jit(embed)

        def extract() -> Features:
            return extract_features(jitted, params, *arrays, batch_size=self.batch_size, what=what)

        if self.cache is None:
            return extract()
        return self.cache.get(name, extract, jitted, params, *arrays)


def sample(n: int, size: int) -> Int[np.ndarray, " rows"]:
    """Returns at most `size` random rows of n, the same for every encoder."""
    return draw_rows(n, size).held
