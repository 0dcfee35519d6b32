"""Where labelled images come from: one line of config, two NumPy arrays per split.

    source = open_source("tfds:cifar10", data_dir=None, image_size=32)
    source.info.num_train, source.info.class_names   # before a single image is decoded
    train, test = source.load()                      # uint8 images, int32 labels

| source          | what                                                                 |
|-----------------|----------------------------------------------------------------------|
| `tfds:<name>`   | a TensorFlow Datasets image classification set; downloaded if needed |
| `npz:<file>`    | arrays in one file, see `npz_source`; `save_npz` writes them         |
| `folder:<path>` | one sub-folder of image files per class, see `folder_files`          |
| `shapes`        | built-in procedural images, see `hjepa_jax.data.shapes`              |

The order of the examples is a function of the source alone; whoever shuffles brings a seed.
TensorFlow is imported only when a `tfds:` source is really read.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Shaped, UInt8
from PIL import Image, ImageOps

from hjepa_jax.data.records import NOT_STREAMED, Labelled, Records, Streaming
from hjepa_jax.errors import InputError
from hjepa_jax.host_memory import available_bytes

NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
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

    @property
    def num_images(self) -> int:
        """Images that are trained on."""
        return self.info.num_train if self.records is None else len(self.records)


def open_source(
    source: str,
    *,
    data_dir: str | None,
    image_size: int,
    seed: int = 0,
    streaming: Streaming = NOT_STREAMED,
    may_download: bool = True,
) -> Source:
    """Finds a source and says what is in it; downloads it first where TFDS has to.

    Args:
      source: one of the forms in the table above.
      data_dir: where TFDS keeps prepared data; None is its own default (`TFDS_DATA_DIR`, or a
        folder in the home directory). Other sources ignore it.
      image_size: side in pixels to which images of varying size are brought (shorter side resized,
        then centre crop). Images that all have one size keep it.
      seed: draws `shapes`. Other sources do not depend on it: if one has no test images, the same
        tenth of its images is held out for every seed (`hjepa_jax.data.test_split`).
      streaming: whether the training images are read while they are trained on.
      may_download: without, a set of TFDS that is not prepared is refused.

    Raises:
      InputError: the source does not exist, cannot be had or breaks a rule of its format.
    """
    try:
        found = _open(source, data_dir, image_size, seed, streaming, may_download)
    except (OSError, RuntimeError, ValueError) as error:  # no home, no rights, no such characters
        raise InputError("data.source", source, first_line(error)) from error
    for num_images in (found.info.num_train, found.info.num_test):
        check_size(source, (num_images, *found.info.image_shape))
    if source.partition(":")[0] not in ("tfds", "folder"):  # small, or in memory by now
        return found

    def load() -> tuple[Split, Split]:
        num_images = found.info.num_train + found.info.num_test
        check_memory(source, num_images * math.prod(found.info.image_shape))
        return found.load()

    return dataclasses.replace(found, load=load)


def _open(
    source: str,
    data_dir: str | None,
    image_size: int,
    seed: int,
    streaming: Streaming,
    may_download: bool,
) -> Source:
    kind, _, rest = source.partition(":")
    if streaming.when == "always" and kind not in ("tfds", "folder"):
        rule = f"needs a source tfds:<name> or folder:<path>, not {source}"
        raise InputError("data.streaming", streaming.when, rule)
    if (streaming.train_split or streaming.class_list) and kind != "tfds":
        field = "data.train_split" if streaming.train_split else "data.class_list"
        value = streaming.train_split or streaming.class_list
        raise InputError(field, value, f"needs a source tfds:<name>, not {source}")
    if source == "shapes":
        return _open_shapes(seed)
    if kind == "tfds" and rest:
        from hjepa_jax.data import tfds_source  # it needs Split from here

        return tfds_source.open_tfds(source, rest, data_dir, image_size, streaming, may_download)
    if kind == "npz" and rest:
        from hjepa_jax.data import npz_source  # as above

        return npz_source.open_npz(source, Path(rest).expanduser())
    if kind == "folder" and rest:
        from hjepa_jax.data import folder_source  # as above

        return folder_source.open_folder(source, Path(rest).expanduser(), image_size, streaming)
    rule = "must be tfds:<name>, npz:<file>, folder:<path> or shapes"
    raise InputError("data.source", source, rule)


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


def first_line(error: BaseException) -> str:
    """Returns the first line of a message that says something, or the name of the error."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def _open_shapes(seed: int) -> Source:
    from hjepa_jax.data import shapes  # it needs Split from here

    num_train, num_test = shapes.NUM_TRAIN, shapes.NUM_TEST
    info = SourceInfo(
        num_train, num_test, (shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3), shapes.CLASS_NAMES
    )
    return Source("shapes", info, lambda: shapes.create_shapes(num_train, num_test, seed))


def save_npz(path: str | os.PathLike[str], train: Split, test: Split) -> None:
    """Writes a file that `npz:<path>` reads back; `path` should end in .npz."""
    arrays = (train.images, train.labels, test.images, test.labels)
    np.savez(path, **dict(zip(NPZ_KEYS, arrays, strict=True)))


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
