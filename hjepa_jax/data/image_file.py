"""Reads one image file, and checks that a file is an image."""

import io
import os
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Num
from PIL import ExifTags, Image, ImageOps, ImageSequence, UnidentifiedImageError

from hjepa_jax.data.base import fitted
from hjepa_jax.data.pixels import fitted_pixels
from hjepa_jax.data.sides import Sides
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.runtime.names import escaped

# Allowed formats. Pillow supports more, and starts other programs for some of them.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Suffixes of these formats. Such a file is not opened before it is decoded.
IMAGE_SUFFIXES = {
    ".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
MULTI_IMAGE_SUFFIXES = (".gif", ".tif", ".tiff")  # such a file often holds several images
# Pillow warns above this number of pixels; it refuses only twice as many.
MAX_PIXELS = 2**30 // 12
# Pillow's modes with more than 8 bits, and the types of their pixels.
_DEEP = {"I": "uint16", "I;16": "uint16", "I;16B": "uint16", "I;16L": "uint16", "F": "float32"}


def has_image_suffix(path: str) -> bool:
    """Returns whether a file has the suffix of an image."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def why_no_image(path: str) -> str:
    """Returns why a file is not an image, by its first bytes; "" if it is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which does not matter
            Image.open(path, formats=IMAGE_FORMATS).close()
    except UnidentifiedImageError:
        return f"no {', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]} image"
    except Exception:  # corrupt data raises almost anything; missing rights an OSError
        return "not readable"
    return ""


class Kind(NamedTuple):
    """Channels and type of the pixels of image files."""

    num_channels: int = 3
    dtype: str = "uint8"


RGB = Kind()


def kind_of(path: str, wanted: int | None) -> Kind:
    """Returns the kind of an image file, given the number of `wanted` channels (None = any).

    An 8-bit file becomes grey if one channel is wanted, and RGB if three or any number are wanted;
    otherwise it keeps its channels. The pages of a TIFF file with one channel each are its
    channels, unless one or three channels are wanted.

    Raises:
      OSError: the file cannot be opened.
    """
    with (
        warnings.catch_warnings(action="ignore"),  # of damaged metadata
        Image.open(path, formats=IMAGE_FORMATS) as image,
    ):
        dtype = _DEEP.get(image.mode, "uint8")
        bands, pages = len(image.getbands()), getattr(image, "n_frames", 1)
        if wanted in (1, 3):
            return Kind(wanted if dtype == "uint8" else 1, dtype)
        if bands == 1 and pages > 1 and image.format == "TIFF":
            return Kind(pages, dtype)
        if dtype == "uint8":
            bands = 3 if wanted is None else bands
        return Kind(bands, dtype)


def sides_of(file: str | io.BytesIO, *, upright: bool = True) -> tuple[int, int]:
    """Returns height and width of an image file without decoding it.

    If `upright`, its EXIF orientation is applied.
    """
    with (
        warnings.catch_warnings(action="ignore"),  # of damaged metadata
        Image.open(file, formats=IMAGE_FORMATS) as image,
    ):
        turned = upright and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def decode_image(
    path: str | os.PathLike[str], image_size: Sides, kind: Kind = RGB
) -> Num[np.ndarray, "S T C"]:
    """Reads one file: rotated by its EXIF tag, resized to cover `image_size`, centre crop.

    If the file holds several images that are not channels, the first one is read.

    Args:
      path: the file.
      image_size: S, or height and width, pixels.
      kind: see `kind_of`; any 8-bit file is converted to RGB or grey, no other file is converted.

    Raises:
      InputError: the file cannot be decoded.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"{size} are more than {MAX_PIXELS} pixels")
            if kind.dtype == "uint8" and image.mode[0] in "IF":  # Pillow would clip it to white
                raise ValueError("more than 8 bits per channel")
            if kind == RGB:
                return fitted(ImageOps.exif_transpose(image), image_size)
            return fitted_pixels(pixels_of(image, kind), image_size)
    except Exception as error:  # on corrupt data Pillow's decoders raise almost anything
        unknown = isinstance(error, UnidentifiedImageError)  # its message is only the path
        reason = f"is none of {', '.join(IMAGE_FORMATS)}" if unknown else first_line(error)
        rule = f"cannot be decoded as an image: {reason}"
        raise InputError("data.source", escaped(os.fspath(path)), rule) from error


def pixels_of(image: Image.Image, kind: Kind) -> Num[np.ndarray, "H W C"]:
    """Returns the unscaled pixels of an image; pages become channels if `kind` says so.

    Raises:
      ValueError: the image has another kind, or pixels that are not finite or not 16 bit.
    """
    if kind == Kind(1):
        return np.asarray(ImageOps.exif_transpose(image).convert("L"))[..., None]
    pages = [np.asarray(ImageOps.exif_transpose(page)) for page in ImageSequence.Iterator(image)]
    pixels = np.stack(pages, axis=-1) if len(pages) == kind.num_channels > 1 else pages[0]
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    found = Kind(pixels.shape[2], _DEEP.get(image.mode, "uint8"))
    if found != kind:
        words = [f"{each.num_channels} channels of {each.dtype}" for each in (found, kind)]
        raise ValueError(f"it has {words[0]}, and most images {words[1]}")
    if kind.dtype == "uint16" and (pixels.min() < 0 or pixels.max() > 65535):
        raise ValueError("its pixels do not fit into 16 bits")
    if not np.isfinite(pixels).all():
        raise ValueError("it has pixels that are not finite")
    return pixels.astype(kind.dtype)
