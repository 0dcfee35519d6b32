"""The `npz:<file>` source: arrays of images, with or without labels, in one file.

| array            | names, in any case; `<split>` and `<kind>` may change places         |
|------------------|----------------------------------------------------------------------|
| training images  | `train_images`, `x_train`, `X_train` ...; without splits: `images`, `x` |
| training labels  | `train_labels`, `y_train`; without splits: `labels`, `y`             |
| test             | `test_images`, `x_test` ...; if there are none: `val_images`, `x_val` |

Images are uint8, uint16 or float32, `[n, H, W, C]` or `[n, H, W]`. Labels are integers `[n]` or
`[n, 1]`, or one-hot `[n, classes]`. If the training images have no labels, test labels are not
used. Other arrays are named on stderr and ignored.
"""

import functools
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from hjepa_jax.data.base import Source, SourceInfo, Split, check_memory, check_size
from hjepa_jax.data.given import parts_of
from hjepa_jax.data.pixels import channels_of, check_finite, check_pixels, with_channels
from hjepa_jax.data.test_split import Role, draw_test, hold_out_test, split_role
from hjepa_jax.data.usage import Unused, usage_line
from hjepa_jax.errors import InputError, first_line

NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
_KINDS = {
    "images": ("images", "image", "imgs", "x", "data"),
    "labels": ("labels", "label", "targets", "target", "y"),
}
_BLOCK_BYTES = 2**24
_Member = tuple[zipfile.ZipInfo, tuple[int, ...], np.dtype]
Pair = tuple[str, str | None]  # the names of the images and of the labels of a split


def save_npz(path: str | os.PathLike[str], train: Split, test: Split) -> None:
    """Writes a file that `npz:<path>` reads back; `path` should end in .npz."""
    arrays = zip(NPZ_KEYS, (train.images, train.labels, test.images, test.labels), strict=True)
    found: dict[str, Any] = {name: array for name, array in arrays if array is not None}
    np.savez(path, **found)


def open_npz(source: str, path: Path, num_channels: int | None = 3) -> Source:
    """Reads and checks the whole file at once; `num_channels` as in `channels_of`.

    Raises:
      InputError: the file cannot be read, or breaks a rule of the format.
    """
    try:
        if not path.is_file():  # opening a pipe would block
            hint = f"; did you mean folder:{path}?" if path.is_dir() else ""
            raise FileNotFoundError(f"there is no such file{hint}")
        with zipfile.ZipFile(path) as archive:
            return _open_archive(source, archive, num_channels)
    except InputError:
        raise
    except Exception as error:  # on corrupt data zipfile and NumPy raise almost anything
        rule = f"must name a readable .npz file: {first_line(error)}"
        raise InputError("data.source", source, rule) from error


def _open_archive(source: str, archive: zipfile.ZipFile, num_channels: int | None) -> Source:
    members = archive.infolist()
    names = [member.filename.removesuffix(".npy") for member in members]
    train_names, test_names = choose_arrays(source, names)
    by_name = dict(zip(names, members, strict=True))
    wholes = [
        _read_split(source, archive, by_name, pair, num_channels)
        for pair in (train_names, test_names)
        if pair
    ]
    check_alike(source, wholes[0], wholes[-1])
    info = info_of(source, *wholes)
    usage = usage_of(source, info, names, train_names, test_names)

    @functools.cache  # called once, because it overwrites the images
    def load() -> tuple[Split, Split]:
        return (wholes[0], wholes[1]) if test_names else hold_out_test(source, wholes[0])

    return Source(source, info, load, parts=parts_of(*wholes), usage=usage)


def check_alike(source: str, train: Split, test: Split) -> None:
    """Refuses training and test images that differ in shape or type."""
    kinds = [(each.images.shape[1:], each.images.dtype) for each in (train, test)]
    if kinds[0] != kinds[1]:
        (shape, dtype), (test_shape, test_dtype) = kinds
        both = f"shape: {shape} and {test_shape}"
        both = both if shape != test_shape else f"type: {dtype} and {test_dtype}"
        raise InputError("data.source", source, f"train and test images differ in {both}")


def info_of(source: str, *wholes: Split) -> SourceInfo:
    """Returns the facts of one or two splits; their classes are named by numbers."""
    labels = [split.labels for split in wholes if split.labels is not None]
    num_classes = 1 + max((int(each.max()) for each in labels), default=-1)
    class_names = tuple(map(str, range(num_classes)))
    images = wholes[0].images
    num_train, num_test = len(images), len(wholes[-1].images)
    if len(wholes) == 1:
        num_test = len(draw_test(source, num_train, wholes[0].labels, ()).held)
        num_train -= num_test
    return SourceInfo(num_train, num_test, images.shape[1:], class_names, images.dtype.name)


def usage_of(
    source: str, info: SourceInfo, names: list[str], train: Pair, test: Pair | None
) -> str:
    """Returns the line about used and unused arrays; `names` are the names of all arrays."""
    used = {*train, *(test or ())}
    unused = [Unused(name, "other arrays") for name in names if name not in used]
    how = f"in {test[0]}" if test else "held out" + ", by class" * bool(info.class_names)
    sizes = f"{info.num_train} images in {train[0]}", f"{info.num_test} images {how}"
    return usage_line(source, *sizes, info.class_names, unused)


def choose_arrays(source: str, names: list[str]) -> tuple[Pair, Pair | None]:
    """Returns the names of the training and of the test arrays."""
    found: dict[tuple[Role | None, str], list[str]] = {}
    for name in names:
        if part := _part(name):
            found.setdefault(part, []).append(name)
    # `images` and `labels` are the training set only if no array has "train" in its name.
    train: Role | None = "train" if any(role == "train" for role, _ in found) else None
    pairs: list[Pair] = []
    for role in (train, "test", "val"):
        if len(pairs) == 2:
            break
        arrays = [found.get((role, kind), []) for kind in _KINDS]
        twice = next((each for each in arrays if len(each) > 1), None)
        if twice:
            rule = f"must hold the arrays of a split once, not {' and '.join(twice)}"
            raise InputError("data.source", source, rule)
        images, labels = ((each or [None])[0] for each in arrays)
        if pairs and pairs[0][1] is None:  # the training images have no labels
            if images:
                pairs.append((images, None))
            continue
        if pairs and (not any(arrays) or (role == "val" and not all(arrays))):
            continue  # half of a validation set is listed as not used
        if role == "test" and not all(arrays):
            rule = f"holds {images or labels}, but not images and labels of a test set"
            raise InputError("data.source", source, rule)
        if not images:
            rule = (
                f"must hold the arrays {', '.join(NPZ_KEYS)} (the last two or none; also "
                f"x_train, y_train ...), not {', '.join(names) or 'nothing'}"
            )
            raise InputError("data.source", source, rule)
        pairs.append((images, labels))
    return pairs[0], pairs[1] if len(pairs) > 1 else None


def _part(name: str) -> tuple[Role | None, str] | None:
    """Returns split (None if the name has none) and kind of an array; None for other arrays."""
    name = re.sub(r"^([xy])(?=train|test|val)", r"\1_", name.lower())  # Xtrain
    words = re.split(r"[ _.-]", name)
    kinds = [kind for kind, words_of in _KINDS.items() for word in words if word in words_of]
    roles: list[Role] = [found[0] for word in words if (found := split_role(word))]
    if len(kinds) != 1 or len(kinds) + len(roles) != len(words) or len(words) > 2:
        return None
    return roles[0] if roles else None, kinds[0]


def _read_split(
    source: str,
    archive: zipfile.ZipFile,
    members: dict[str, zipfile.ZipInfo],
    names: Pair,
    num_channels: int | None,
) -> Split:
    images, *others = (_read_header(archive, members[name]) for name in names if name)
    for member in (images, *others):
        check_size(source, member[1], member[2].itemsize)
        _check_length(member)
    _, shape, dtype = images
    found = check_images(source, names[0], shape, dtype)
    labels = None
    if others:
        member, label_shape, label_dtype = others[0]
        check_labels(source, names, shape, label_shape, label_dtype)
        with archive.open(member) as file:
            labels = read_labels(
                source, str(names[1]), np.lib.format.read_array(file, allow_pickle=False)
            )
    num_channels = channels_of(source, found, num_channels)
    check_size(source, (*shape[:3], num_channels), dtype.itemsize)
    check_memory(source, math.prod(shape[:3]) * num_channels * dtype.itemsize)
    read = _read_images(archive, images, num_channels)
    check_finite(source, names[0], read)
    return Split(read, labels)


def check_images(source: str, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Returns the number of channels; refuses an array that holds no images ("data.source")."""
    rule = ""
    if len(shape) not in (3, 4):
        rule = f"{name} must be [n, H, W, C] or [n, H, W]"
    elif not math.prod(shape):
        rule = f"{name} must not be empty"
    rule = rule or check_pixels(name, dtype, (*shape, 1)[3])
    if rule:
        raise InputError("data.source", source, f"{rule} (found images {dtype}{shape})")
    return (*shape, 1)[3]


def check_labels(
    source: str, names: Pair, shape: tuple[int, ...], label_shape: tuple[int, ...], dtype: Any
) -> None:
    """Refuses labels that do not fit images of this shape, before they are read."""
    rule = "" if dtype.kind in "biuf" else f"{names[1]} must be integers"
    if label_shape[:1] != shape[:1]:
        rule = rule or f"{names[1]} must hold one label per image"
    if rule:
        found = f"images {shape}, labels {dtype}{label_shape}"
        raise InputError("data.source", source, f"{rule} (found {found})")


def read_labels(source: str, name: str, array: np.ndarray) -> np.ndarray:
    """Returns labels int32 [n] from an array of whole numbers or one-hot rows."""
    read, rule = _as_labels(array), ""
    if read is None:
        rule = "must hold one label per image: whole numbers [n] or [n, 1], or one-hot rows"
    elif read.min() < 0 or read.max() >= 2**16:
        rule = "must lie in [0, 65535]"
    if read is None or rule:
        found = f"(found labels {array.dtype}{array.shape})"
        raise InputError("data.source", source, f"{name} {rule} {found}")
    return read.astype(np.int32)


def _as_labels(array: np.ndarray) -> np.ndarray | None:
    """Returns labels [n] from whole numbers or one-hot rows; None for other arrays."""
    if array.ndim == 2 and array.shape[1] > 1:
        one_hot = np.all((array == 0) | (array == 1)) and np.all((array == 1).sum(axis=1) == 1)
        return array.argmax(axis=1) if one_hot else None
    if array.size != len(array):
        return None
    array = array.reshape(len(array))
    if array.dtype.kind == "f":
        whole = np.isfinite(array) & (array == np.floor(array))
        return np.clip(array, -1, 2**16).astype(np.int64) if whole.all() else None
    return array.astype(np.uint8) if array.dtype == bool else array


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Member:
    with archive.open(member) as file:
        shape, _, dtype = _parse_header(file)
        return member, shape, dtype


def _parse_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    major, _ = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0
    if major > 1:
        read_header = np.lib.format.read_array_header_2_0
    return read_header(file)


def _check_length(member: _Member) -> None:
    """Refuses an array with less data than its header says, before NumPy allocates its memory."""
    info, shape, dtype = member
    if math.prod(shape) * dtype.itemsize > info.file_size or min(shape, default=0) < 0:
        raise ValueError(f"{info.filename} is shorter than its shape {shape}")


def _read_images(
    archive: zipfile.ZipFile, member: _Member, num_channels: int
) -> Num[np.ndarray, "n H W C"]:
    """Reads images block by block into one array, so that no second copy is made."""
    with archive.open(member[0]) as file:
        shape, is_fortran, dtype = _parse_header(file)
        if is_fortran:  # stored pixel by pixel, not image by image: no blocks
            file.seek(0)
            array = np.lib.format.read_array(file, allow_pickle=False)
            return with_channels(array.astype(dtype.newbyteorder("=")), num_channels)
        images = np.empty((*shape[:3], num_channels), dtype.newbyteorder("="))
        row_shape = (*shape[1:3], 1 if len(shape) == 3 else shape[3])
        num_bytes = math.prod(row_shape) * dtype.itemsize
        rows = max(1, _BLOCK_BYTES // num_bytes)
        for start in range(0, len(images), rows):
            count = min(rows, len(images) - start)
            data = file.read(count * num_bytes)
            if len(data) < count * num_bytes:
                raise ValueError(f"{member[0].filename} ends too early")
            block = np.frombuffer(data, dtype).reshape(count, *row_shape)
            images[start : start + count] = block  # grey values are repeated
        return images
