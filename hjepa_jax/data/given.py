"""Images that a user passes, converted to the form that an encoder takes.

Files and arrays are treated alike: rotated upright (files), resized to cover the size (bicubic),
centre crop. So the features of a photo do not depend on how it is passed.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Num, Shaped
from PIL import Image

from hjepa_jax.data.base import Split, fit_pixels
from hjepa_jax.data.image_file import RGB, Kind, decode_image, kind_of
from hjepa_jax.data.records import Labelled
from hjepa_jax.data.sides import Sides, pair
from hjepa_jax.errors import InputError


def _per_image(num_channels: int) -> str:
    return f"[H, W, {num_channels}], [H, W, 1] or [H, W]"


@dataclasses.dataclass(frozen=True)
class GivenImages:
    """Files and arrays of any size; see `hjepa_jax.data.records.Images`.

    Attributes:
      items: one per image: a path, or an array that `as_stored` accepts.
      image_size: S, side of the returned images in pixels, or height and width.
      num_channels: C of the returned images.
      dtype: type of arrays that are passed as they are stored; None = see `as_stored`.
    """

    items: Sequence[Any] | np.ndarray
    image_size: Sides
    num_channels: int = 3
    dtype: str | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (*pair(self.image_size), self.num_channels)

    def __len__(self) -> int:
        return len(self.items)

    def read(self, row: int) -> Num[np.ndarray, "S T C"]:
        item = self.items[row]
        if isinstance(item, str | os.PathLike):
            try:
                image = decode_image(os.path.expanduser(item), self.image_size, self._kind)
            except InputError as error:
                raise InputError("images", os.fspath(item), error.rule) from error
        else:
            image = np.asarray(item) if self.dtype else as_stored(item, self.num_channels)
            image = image if image.ndim == 3 else image[..., None]
        return fit_pixels(image, self.image_shape)

    @functools.cached_property
    def _kind(self) -> Kind:
        """The kind of the first file, which all files must have."""
        path = next(each for each in self.items if isinstance(each, str | os.PathLike))
        try:
            return kind_of(os.path.expanduser(path), self.num_channels)
        except Exception:  # `read` reports the error
            return RGB


def parts_of(*splits: Split) -> tuple[Labelled, ...]:
    """Returns the images of splits one by one, as they are stored."""
    return tuple(
        Labelled(
            GivenImages(x.images, x.images.shape[1:3], x.images.shape[3], x.images.dtype.name),
            x.labels,
            x.names,
        )
        for x in splits
    )


def images_of(images: Any, num_channels: int = 3) -> Sequence[Any] | np.ndarray:
    """Returns a sequence of single images that are grey or have `num_channels` channels.

    `images` is an array of one image or of a batch, a path, or a list or tuple of arrays and paths.

    Raises:
      InputError: `images` is anything else ("images").
    """
    if isinstance(images, str | os.PathLike):
        return [images]
    if isinstance(images, list | tuple):
        for item in images:
            if not isinstance(item, str | os.PathLike) and np.ndim(_array(item)) < 2:
                rule = f"must be paths or arrays {_per_image(num_channels)}"
                raise InputError("images", _about(item), rule)
        return images
    array = _array(images)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, num_channels)):
        return [array]
    if array.ndim == 4 and array.shape[3] in (1, num_channels):
        return array
    # [B, H, W] is refused: it may be one image with its channels first, or with transparency.
    shape = _per_image(num_channels)
    rule = f"must be one image {shape}, or a batch [B, H, W, {num_channels}] or [B, H, W, 1]"
    raise InputError("images", _about(array), rule)


def as_stored(image: Any, num_channels: int = 3) -> Num[np.ndarray, "H W *C"]:
    """Returns an image in the form in which data sets store it.

    Images of uint8 and uint16 stay as they are. If `num_channels` is 3, floats must lie in [0, 1]
    and become uint8, 0 ... 255. Otherwise floats of any value become float32. Only the type
    decides, not the values.

    Args:
      image: uint8 or uint16 [H, W, C], [H, W, 1] or [H, W], or floats in [0, 1] of such a shape.
      num_channels: C.

    Raises:
      InputError: for another type or shape, or floats outside of [0, 1] ("images").
    """
    array = _array(image)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, num_channels):
        raise InputError("images", _about(array), f"must be {_per_image(num_channels)}")
    if not array.size:
        raise InputError("images", _about(array), "must not be empty")
    if array.dtype in (np.uint8, np.uint16):
        return array
    if array.dtype.kind != "f":
        rule = "must be uint8, uint16, or floats in [0, 1]; scale it, so that black and white fit"
        raise InputError("images", _about(array), rule)
    if num_channels != 3:
        if not np.isfinite(array).all():
            raise InputError("images", _about(array), "must be finite")
        return array.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        rule = f"floats must lie in [0, 1], these lie in [{low:g}, {high:g}]"
        raise InputError("images", _about(array), rule)
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _array(value: Any) -> Shaped[np.ndarray, "..."]:
    if isinstance(value, Image.Image):
        rule = "must be an array, such as np.asarray(image.convert('RGB')), or the path of a file"
        raise InputError("images", f"PIL image, mode {value.mode}", rule)
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different lengths
        rule = "must be paths or arrays, one image each"
        raise InputError("images", type(value).__name__, rule) from error


def _about(value: Any) -> str:
    array = np.asarray(value)
    return f"{array.dtype}{list(array.shape)}"
