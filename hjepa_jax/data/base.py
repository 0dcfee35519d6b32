"""A data set on the host: `Split`, `Source`, and the rules that every format shares."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Int32, Shaped, UInt8
from PIL import Image, ImageOps

from hjepa_jax.data.records import Labelled, Records, Streaming
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.host_memory import available_bytes

# A split beyond this would crowd out the model on a small device.
MAX_RESIDENT_BYTES = 8 * 1024**3


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels of one split, on the host, and their files where each has its own."""

    images: UInt8[np.ndarray, "n H W C"]
    labels: Int32[np.ndarray, " n"]
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """What is known of a source before its images are decoded.

    Attributes:
      num_train: labelled training images that `load` returns, the ones held out for validation
        included. Of a folder, files: those that turn out to be no images are missing there.
      num_test: test images, or files.
      image_shape: (H, W, C) of every image that `load` returns; C is 3.
      class_names: indexed by label.
    """

    num_train: int
    num_test: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A source that exists and can be read; `load` does the work and returns (train, test).

    Where the source is streamed, those are what probes see, and `records` what is trained on.
    Elsewhere `records` is None, and all of train is trained on.

    A folder also names its files in `parts`: all images of train and of test; of a folder that is
    not streamed and has no split of its own, all images in one part, of which `load` holds some out
    for the test with `hold_out_test`.
    """

    name: str
    info: SourceInfo
    load: Callable[[], tuple[Split, Split]]
    records: Records | None = None
    parts: tuple[Labelled, ...] = ()
    usage: str = ""  # a line for the user: which images are used, and which are not and why

    @property
    def num_images(self) -> int:
        """Images that are trained on."""
        return self.info.num_train if self.records is None else len(self.records)


def check_size(source: str, shape: tuple[int, ...], itemsize: int = 1) -> None:
    """Refuses an array that would not fit, before anything of its size is made.

    Raises:
      InputError: for more than `MAX_RESIDENT_BYTES`.
    """
    num_bytes = math.prod(shape) * itemsize
    if num_bytes > MAX_RESIDENT_BYTES:
        limit = f"{MAX_RESIDENT_BYTES / 2**30:.0f} GiB"
        rule = f"must fit the device as uint8, {limit}; this is {num_bytes / 2**30:.1f} GiB"
        raise InputError("data.source", source, rule)


def check_memory(source: str, num_bytes: int) -> None:
    """Refuses what the machine has no memory for, before it is read.

    Raises:
      InputError: less than `num_bytes` are available.
    """
    available = available_bytes()
    if available is not None and num_bytes > available:
        needed, there = (f"{size / 2**30:.1f} GiB" for size in (num_bytes, available))
        rule = f"needs {needed} of memory for its images, and {there} are available"
        raise InputError("data.source", source, rule)


def streams(streaming: Streaming, num_images: int, shape: tuple[int, int, int]) -> bool:
    """Whether a training set of so many decoded images is to be streamed."""
    too_large = num_images * math.prod(shape) > MAX_RESIDENT_BYTES
    return streaming.when == "always" or (streaming.when == "auto" and too_large)


def as_rgb(images: Shaped[np.ndarray, "n H W *C"]) -> UInt8[np.ndarray, "n H W 3"]:
    """Returns images [n, H, W, 3]: grey values are repeated in three channels."""
    if images.ndim == 3:
        images = images[..., None]
    return images if images.shape[3] == 3 else np.repeat(images, 3, axis=3)


def square(image: Image.Image, image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Returns an RGB image: the shorter side is resized to `image_size`, the centre cut out.

    `hjepa_jax.data.augment` brings stored images that are not square to the same centre.
    """
    size = (image_size, image_size)
    return np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC))
