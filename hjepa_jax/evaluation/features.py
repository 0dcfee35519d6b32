"""Features of whole data sets from a frozen encoder, in batches of one shape."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from hjepa_jax.data.augment import resize_and_normalize

# Larger images are brought to this size for the raw-pixel rows: 3,072 numbers, as CIFAR's.
PIXEL_SIZE = 32

Features = dict[str, Float[np.ndarray, "n _"]]
EmbedFn = Callable[[Any, Any], dict[str, Any]]


def extract_features(
    embed: EmbedFn, encoder_params: Any, images: UInt8[np.ndarray, "n H W C"], *, batch_size: int
) -> Features:
    """Runs `embed` over all images; the last batch is padded, so it compiles once.

    Args:
      embed: jitted `embed(encoder_params, images)`, a dict of [B, D] arrays.
      encoder_params: parameters of the encoder to judge.
      images: the images, as stored.
      batch_size: images per call.

    Returns:
      The same dict for all images, float32 on the host.
    """
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padding = [(0, batch_size - len(batch))] + [(0, 0)] * (images.ndim - 1)
        features = jax.device_get(embed(encoder_params, np.pad(batch, padding)))
        parts.append({name: value[: len(batch)] for name, value in features.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def embed_pixels(_: Any, images: UInt8[jax.Array, "B H W C"]) -> dict[str, Float[jax.Array, "B _"]]:
    """The "encoder" of the raw-pixel baseline: the pixels themselves, at most 32x32."""
    size = min(PIXEL_SIZE, images.shape[1])
    pixels = resize_and_normalize(images, image_size=size, mean=(0.0,) * 3, std=(1.0,) * 3)
    return {"pixels": pixels.reshape(len(images), -1)}


def representations(features: Features) -> list[tuple[str, int | str, Float[np.ndarray, "n _"]]]:
    """What of an encoder's features a probe is tried on, as (pool, level, array).

    Every level by itself, all levels concatenated, the summary tokens, and everything together.
    """
    if "pixels" in features:
        return [("concat", 0, features["pixels"])]
    levels = [name for name in features if name.startswith("level_")]
    found: list[tuple[str, int | str, Any]] = [
        ("mean", int(name.removeprefix("level_")), features[name]) for name in levels
    ]
    if len(levels) > 1:
        found.append(("mean", "all", np.concatenate([features[n] for n in levels], axis=1)))
    if "summary" in features:
        found.append(("summary", "all", features["summary"]))
        found.append(("concat", "all", np.concatenate(list(features.values()), axis=1)))
    return found
