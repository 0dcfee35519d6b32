"""The `npy:<path>` source: arrays in .npy files, mapped into memory instead of read.

The path is one file of images without labels, or a folder with files that are named like the
arrays of `hjepa_jax.data.npz`: `train_images.npy`, `train_labels.npy`, `test_images.npy` ...
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from jaxtyping import Int, Num

from hjepa_jax.data.base import Source, Split, is_streamed
from hjepa_jax.data.npz import (
    Pair,
    check_alike,
    check_images,
    check_labels,
    choose_arrays,
    info_of,
    read_labels,
    usage_of,
)
from hjepa_jax.data.pixels import channels_of, check_finite, with_channels
from hjepa_jax.data.records import NOT_STREAMED, Labelled, Streaming, stamps_of
from hjepa_jax.data.rows import draw_rows
from hjepa_jax.data.test_split import draw_test
from hjepa_jax.errors import InputError, first_line


@dataclasses.dataclass(frozen=True)
class NpyRecords:
    """Rows of an array in a file; see `hjepa_jax.data.records.Records`.

    Attributes:
      path: the file.
      image_shape: (H, W, C) of the returned images.
      rows: rows of the array, in their order here.
    """

    path: str
    image_shape: tuple[int, int, int]
    rows: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Num[np.ndarray, "H W C"]:
        at = int(self.rows[row])
        (image,) = _take(_mapped(self.path), np.array([at]), self.image_shape[2])
        check_finite(f"npy:{self.path}", f"image {at}", image)
        return image

    def stamps(self) -> list[tuple[str, int, int]]:
        return stamps_of([self.path], [Path(self.path).name])


def open_npy(
    source: str, path: Path, streaming: Streaming = NOT_STREAMED, num_channels: int | None = 3
) -> Source:
    """Opens `npy:<path>`; see `hjepa_jax.data.sources.open_source`."""
    if path.is_file():
        files = {"train_images": path}
    elif path.is_dir():
        files = {each.stem: each for each in sorted(path.glob("*.npy"))}
    else:
        raise InputError("data.source", source, "must name a .npy file or a folder of them")
    train_names, test_names = choose_arrays(source, [*files])
    images = [files[names[0]] for names in (train_names, test_names) if names]
    wholes = [_map(source, files, names) for names in (train_names, test_names) if names]
    check_alike(source, wholes[0], wholes[-1])
    channels = channels_of(source, wholes[0].images.shape[3], num_channels)
    shape = (*wholes[0].images.shape[1:3], channels)
    info = dataclasses.replace(info_of(source, *wholes), image_shape=shape)
    rows = [np.arange(len(whole.images)) for whole in wholes]
    parts = tuple(
        Labelled(NpyRecords(str(path), shape, every), whole.labels, ())
        for path, whole, every in zip(images, wholes, rows, strict=True)
    )
    if len(wholes) == 1:
        rows, wholes = [*draw_test(source, len(rows[0]), wholes[0].labels, ())], wholes * 2
    usage = usage_of(source, info, [*files], train_names, test_names)
    records = None
    if is_streamed(streaming, info.num_train, shape, info.dtype):
        records = NpyRecords(str(images[0]), shape, rows[0])
        rows = [part[draw_rows(len(part), streaming.max_labelled).held] for part in rows]
        info = dataclasses.replace(info, num_train=len(rows[0]), num_test=len(rows[1]))

    def load() -> tuple[Split, Split]:
        loaded = []
        for whole, part in zip(wholes, rows, strict=True):
            found = _take(whole.images, part, channels)
            check_finite(source, "images", found)
            loaded.append(Split(found, None if whole.labels is None else whole.labels[part]))
        return loaded[0], loaded[1]

    return Source(source, info, load, records, parts, usage)


def _map(source: str, files: dict[str, Path], names: Pair) -> Split:
    """Returns a split; its images stay in their file."""
    images, labels = _mapped(str(files[names[0]])), None
    check_images(source, names[0], images.shape, images.dtype)
    if names[1]:
        array = _mapped(str(files[names[1]]))
        check_labels(source, names, images.shape, array.shape, array.dtype)
        labels = read_labels(source, names[1], array)
    return Split(images if images.ndim == 4 else images[..., None], labels)


@functools.lru_cache
def _mapped(path: str) -> np.ndarray:
    source = f"npy:{path}"
    try:
        found = np.load(path, mmap_mode="r")
    except (EOFError, ValueError) as error:
        rule = f"cannot be read: {first_line(error)}"
        raise InputError("data.source", source, rule) from error
    if not isinstance(found, np.ndarray):
        raise InputError("data.source", source, f"must be a .npy file; did you mean npz:{path}?")
    return found


def _take(
    images: np.ndarray, rows: Int[np.ndarray, " rows"], num_channels: int
) -> Num[np.ndarray, "rows H W C"]:
    """Returns rows of a mapped array in the byte order of this machine; all rows uncopied."""
    found = images if len(rows) == len(images) else images[rows]
    native = found.astype(found.dtype.newbyteorder("="), copy=False)
    return with_channels(native, num_channels)
