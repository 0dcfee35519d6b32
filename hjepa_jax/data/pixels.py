"""Stored pixels: their types and channels, and the scale of the pixels that models get.

Integers are divided by the largest value of their type, so that they lie in [0, 1]. Floats are not
scaled. `data.mean` and `data.std` refer to this scale.
"""

from typing import Any

import numpy as np
from jaxtyping import Num
from PIL import Image, ImageOps

from hjepa_jax.data.sides import Sides, pair
from hjepa_jax.errors import InputError

DTYPES = ("uint8", "uint16", "float32")
MAX_CHANNELS = 32
SAMPLED_BYTES = 2**28  # largest sample from which `data.mean` and `data.std` are computed
_WANTED = "must be uint8, uint16 or float32, with 1 to 32 channels"


def full_scale(dtype: Any) -> float:
    """Returns the stored value that becomes 1 on the scale of the model."""
    return float(np.iinfo(dtype).max) if np.dtype(dtype).kind == "u" else 1.0


def check_pixels(name: str, dtype: np.dtype, num_channels: int) -> str:
    """Returns the rule that images of this type and these channels break; "" if they break none."""
    fits = dtype.name in DTYPES and 1 <= num_channels <= MAX_CHANNELS
    return "" if fits else f"{name} {_WANTED}, not {dtype} with {num_channels}"


def check_finite(source: str, name: str, images: Num[np.ndarray, "..."]) -> None:
    """Refuses images with NaN or infinite pixels ("data.source")."""
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise InputError("data.source", source, f"{name} must be finite, without NaN")


def channels_of(source: str, found: int, wanted: int | None) -> int:
    """Returns the number of channels of the images that a source returns.

    Args:
      source: name of the source, for the error.
      found: channels of the stored images.
      wanted: number of entries of `data.mean`; None = any. Grey values are repeated for three.

    Raises:
      InputError: the images have another number of channels ("data.mean").
    """
    if wanted is None or wanted == found or (found, wanted) == (1, 3):
        return wanted or found
    rule = f"must have one number per channel, and {source} has {found}; auto computes them"
    raise InputError("data.mean", f"{wanted} numbers", rule)


def with_channels(images: Num[np.ndarray, "n H W *C"], num: int) -> Num[np.ndarray, "n H W C"]:
    """Returns images [n, H, W, num]; grey values are repeated."""
    if images.ndim == 3:
        images = images[..., None]
    return images if images.shape[3] == num else np.repeat(images, num, axis=3)


def fitted_pixels(image: Num[np.ndarray, "H W C"], size: Sides) -> Num[np.ndarray, "S T C"]:
    """Does the same as `hjepa_jax.data.base.fitted`, for any pixel type and number of channels."""
    height, width = pair(size)
    planes = [Image.fromarray(image[..., i].astype(np.float32)) for i in range(image.shape[2])]
    fitted = [ImageOps.fit(plane, (width, height), Image.Resampling.BICUBIC) for plane in planes]
    x = np.stack([np.asarray(plane) for plane in fitted], axis=-1)
    if image.dtype.kind == "u":  # the filter overshoots
        x = np.clip(np.rint(x), 0, np.iinfo(image.dtype).max)
    return x.astype(image.dtype)


def pixel_statistics(
    images: Num[np.ndarray, "n H W C"],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel, on the scale of the model.

    Computed in float64 from at most `SAMPLED_BYTES` of evenly spaced images, and rounded to six
    digits. The standard deviation of a constant channel is given as 1.
    """
    stride = -(-images.nbytes // SAMPLED_BYTES)
    x = images[:: max(1, stride)]
    total = np.zeros((2, images.shape[3]))
    shift = x[0].mean(axis=(0, 1), dtype=np.float64)  # avoids cancellation in the variance
    for image in x:
        pixels = image.reshape(-1, image.shape[-1]).astype(np.float64) - shift
        total += pixels.sum(axis=0), (pixels**2).sum(axis=0)
    mean, square = total / (len(x) * x[0][..., 0].size)
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    scale = full_scale(images.dtype)
    rounded = [
        tuple(float(f"{value:.6g}") for value in values / scale) for values in (mean + shift, std)
    ]
    return rounded[0], tuple(value or 1.0 for value in rounded[1])
