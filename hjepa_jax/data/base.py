"""A data set on the host: `Split`, `Source`, and the rules that all formats share."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Int32, Num
from PIL import Image, ImageOps

from hjepa_jax.data.pixels import fitted_pixels, with_channels
from hjepa_jax.data.records import Labelled, Records, Streaming
from hjepa_jax.data.sides import Sides, pair
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.host_memory import available_bytes

# A larger split would leave too little memory for the model on a small device.
MAX_RESIDENT_BYTES = 8 * 1024**3


@dataclasses.dataclass(frozen=True)
class Split:
    """Decoded images of one split, their labels (None = no labels), and their file names if any."""

    images: Num[np.ndarray, "n H W C"]
    labels: Int32[np.ndarray, " n"] | None
    names: tuple[str, ...] = ()

    @property
    def classes(self) -> Int32[np.ndarray, " n"]:
        """The labels of a split that is known to have labels."""
        assert self.labels is not None
        return self.labels


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """Facts about a source that are known before any image is decoded.

    Attributes:
      num_train: number of training images that `load` returns. For a folder: number of files,
        unreadable ones included.
      num_test: the same for the test images.
      image_shape: (H, W, C) of every image that `load` returns.
      dtype: type of its pixels: uint8, uint16 or float32.
      class_names: indexed by label; empty without labels.
    """

    num_train: int
    num_test: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    dtype: str = "uint8"

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.image_shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Source:
    """A source that exists and can be read.

    Attributes:
      name: value of `data.source`.
      info: see `SourceInfo`.
      load: decodes and returns (train, test). A streamed source returns only the images for probes.
      records: training images of a streamed source, larger than the images of `load` if crops are
        cut from originals; None if all images are in memory.
      parts: the images of `load` one by one, in the order of the source: training images, then test
        images. There is one part if `load` draws the test images (two for a streamed folder). If
        empty, use `load`. Not to be used after `load`, which may reorder the arrays in place.
      usage: one line for the user: which images are used, which are not, and why.
      stored: (H, W) of the images of `originals`; None = as in `load`.
      originals: decodes the images of `load()[0]` again, to cut crops from them; None if the run
        trains on `load()[0]` or on `records`.
    """

    name: str
    info: SourceInfo
    load: Callable[[], tuple[Split, Split]]
    records: Records | None = None
    parts: tuple[Labelled, ...] = ()
    usage: str = ""
    stored: tuple[int, int] | None = None
    originals: Callable[[Split], Num[np.ndarray, "n H W C"]] | None = None

    @property
    def num_images(self) -> int:
        """Number of images to train on."""
        return self.info.num_train if self.records is None else len(self.records)

    @property
    def train_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images to train on."""
        if self.records is not None:
            return self.records.image_shape
        return (*(self.stored or self.info.image_shape[:2]), self.info.image_shape[2])

    @property
    def train_bytes(self) -> int:
        """Bytes of an image to train on."""
        return math.prod(self.train_shape) * np.dtype(self.info.dtype).itemsize


def check_size(source: str, shape: tuple[int, ...], itemsize: int = 1) -> None:
    """Refuses an array of more than `MAX_RESIDENT_BYTES`, before memory is allocated."""
    num_bytes = math.prod(shape) * itemsize
    if num_bytes > MAX_RESIDENT_BYTES:
        limit = f"{MAX_RESIDENT_BYTES / 2**30:.0f} GiB"
        rule = f"must fit the device, {limit}; this is {num_bytes / 2**30:.1f} GiB"
        raise InputError("data.source", source, rule)


def check_memory(source: str, num_bytes: int) -> None:
    """Refuses data that exceeds the free memory of the host, before it is read."""
    available = available_bytes()
    if available is not None and num_bytes > available:
        needed, there = (f"{size / 2**30:.1f} GiB" for size in (num_bytes, available))
        rule = f"needs {needed} of memory for its images, and {there} are available"
        raise InputError("data.source", source, rule)


def is_streamed(
    streaming: Streaming, num_images: int, shape: tuple[int, int, int], dtype: str = "uint8"
) -> bool:
    """Returns whether a training set of this size is streamed."""
    num_bytes = num_images * math.prod(shape) * np.dtype(dtype).itemsize
    too_large = num_bytes > MAX_RESIDENT_BYTES
    return streaming.when == "always" or (streaming.when == "auto" and too_large)


def fit_pixels(
    image: Num[np.ndarray, "H W C"], shape: tuple[int, int, int]
) -> Num[np.ndarray, "S T D"]:
    """Returns an image of this shape: resized and cropped like `fitted`, grey values repeated."""
    image = with_channels(image[None], shape[2])[0]
    if image.shape == shape:
        return image
    if image.dtype == np.uint8 and shape[2] == 3:
        return fitted(Image.fromarray(image), shape[:2])
    return fitted_pixels(image, shape[:2])


def fitted(image: Image.Image, image_size: Sides) -> Num[np.ndarray, "S T 3"]:
    """Returns an RGB image: resized so that it just covers `image_size`, then centre crop.

    `hjepa_jax.data.augment` takes the same crop of stored images of another shape.
    """
    height, width = pair(image_size)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC))
