"""One image file: whether it is one, and its pixels."""

import os
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from hjepa_jax.data.base import fitted
from hjepa_jax.data.sides import Sides
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.runtime.names import escaped

# Pillow reads more formats, and starts other programs for some of them.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Suffixes of these formats. Such a file is not opened before it is decoded.
IMAGE_SUFFIXES = {
    ".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
MULTI_IMAGE_SUFFIXES = (".gif", ".tif", ".tiff")  # such a file often holds several images
# Pillow warns above this number of pixels; it refuses only twice as many.
MAX_PIXELS = 2**30 // 12


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


def decode_image(path: str | os.PathLike[str], image_size: Sides) -> UInt8[np.ndarray, "S T 3"]:
    """Reads one file: upright by its EXIF tag, RGB, resized to cover `image_size`, centre crop.

    The first image is read if a file holds several.

    Raises:
      InputError: the file cannot be decoded.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"{size} are more than {MAX_PIXELS} pixels")
            if image.mode[0] in "IF":  # Pillow would clip 16-bit grey to white
                raise ValueError("more than 8 bits per channel")
            return fitted(ImageOps.exif_transpose(image), image_size)
    except Exception as error:  # on corrupt data Pillow's decoders raise almost anything
        unknown = isinstance(error, UnidentifiedImageError)  # its message is only the path
        reason = f"is none of {', '.join(IMAGE_FORMATS)}" if unknown else first_line(error)
        rule = f"cannot be decoded as an image: {reason}"
        raise InputError("data.source", escaped(os.fspath(path)), rule) from error
