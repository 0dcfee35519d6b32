"""The `folder:<path>` source: one sub-folder of image files per class.

What stands in a folder is anybody's: whatever is no picture is skipped and listed, not a reason to
end a run. A class is never dropped, though: without an image left it is refused.
"""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from hjepa_jax.data.records import (
    NOT_STREAMED,
    Labelled,
    Streaming,
    read_all,
    report_skipped,
    stamps_of,
)
from hjepa_jax.data.sources import (
    Source,
    SourceInfo,
    Split,
    first_line,
    hold_out,
    hold_out_test,
    num_held_out,
    square,
    streams,
)
from hjepa_jax.errors import InputError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# A file is read as one of these whatever its suffix: Pillow knows more, and some start programs.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Where Pillow, too, begins to suspect a decompression bomb; it refuses only at twice as many.
MAX_PIXELS = 2**30 // 12
TEST_FOLDERS = ("test", "val", "validation")


class _Listing(NamedTuple):
    """The files of a split in order of class and name, and their labels."""

    class_names: tuple[str, ...]
    files: list[str]
    labels: Int32[np.ndarray, " n"]

    def part(self, rows: Int[np.ndarray, " rows"]) -> "_Listing":
        return _Listing(self.class_names, [self.files[i] for i in rows], self.labels[rows])

    def labelled(self, top: Path, image_size: int) -> Labelled:
        names = tuple(os.path.relpath(path, top) for path in self.files)
        return Labelled(FolderRecords(self.files, image_size), self.labels, names)


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """Images of files, brought to one size; see `hjepa_jax.data.records.Records`."""

    files: list[str]
    image_size: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, 3)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> UInt8[np.ndarray, "S S 3"]:
        return decode_image(self.files[row], self.image_size)

    def stamps(self) -> list[tuple[str, int, int]]:
        ends = (min(self.files), max(self.files))  # all share the folders that these share
        shared = len(os.path.commonpath([os.path.dirname(path) for path in ends]))
        return stamps_of(self.files, [path[shared:] for path in self.files])


def open_folder(
    source: str, root: Path, image_size: int, seed: int, streaming: Streaming = NOT_STREAMED
) -> Source:
    """Opens `folder:<path>`; see `hjepa_jax.data.sources.open_source`."""
    top = root = root.resolve()
    if not root.is_dir():
        raise InputError("data.source", source, "must name a folder that exists")
    roots = [root]
    if _sub_folders(root / "train"):  # else "train" may be a class, beside "car" and "plane"
        tests = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
        roots = [root / "train", *tests[:1]]
    skipped: list[InputError] = []
    listings = [_list_classes(source, top, each, skipped) for each in roots]
    class_names = listings[0].class_names
    if listings[-1].class_names != class_names:
        differing = ", ".join(sorted({*listings[-1].class_names} ^ {*class_names}))
        rule = f"train and {roots[-1].name} must have the same classes; one lacks {differing}"
        raise InputError("data.source", source, rule)
    counts = [len(listing.files) for listing in listings]
    num_files = sum(counts)
    report_skipped(source, skipped, f"{num_files + len(skipped)} files")
    if streams(streaming, counts[0], (image_size, image_size, 3)):
        if len(listings) == 1:
            held_out = hold_out(num_files, num_held_out(source, num_files), seed)
            listings = [listings[0].part(rows) for rows in held_out]
        return _open_streamed(source, top, listings, image_size, seed, streaming)

    def load() -> tuple[Split, Split]:
        skipped: list[InputError] = []
        splits = [_read_split(top, listing, image_size, skipped) for listing in listings]
        for listing, split in zip(listings, splits, strict=True):
            for label in np.setdiff1d(listing.labels, split.labels)[:1]:
                rule = f"there is no image left in class {class_names[label]}{_first(skipped)}"
                raise InputError("data.source", source, rule)
        train, test = splits if len(splits) == 2 else hold_out_test(source, splits[0], seed)
        report_skipped(source, skipped, f"{num_files} files")
        return train, test

    num_test = counts[1] if len(counts) == 2 else num_held_out(source, num_files)
    shape = (image_size, image_size, 3)
    info = SourceInfo(num_files - num_test, num_test, shape, class_names)
    parts = tuple(listing.labelled(top, image_size) for listing in listings)
    return Source(source, info, load, parts=parts)


def _open_streamed(
    source: str,
    top: Path,
    listings: list[_Listing],
    image_size: int,
    seed: int,
    streaming: Streaming,
) -> Source:
    """A folder whose training images are read while they are trained on."""
    labelled = [
        listing.part(streaming.draw_labelled(np.arange(len(listing.files)), seed))
        for listing in listings
    ]

    def load() -> tuple[Split, Split]:
        skipped: list[InputError] = []
        train, test = (_read_split(top, listing, image_size, skipped) for listing in labelled)
        num_files = sum(len(listing.files) for listing in labelled)
        report_skipped(source, skipped, f"{num_files} files")
        return train, test

    num_train, num_test = (len(listing.files) for listing in labelled)
    records = FolderRecords(listings[0].files, image_size)
    info = SourceInfo(num_train, num_test, records.image_shape, listings[0].class_names)
    parts = tuple(listing.labelled(top, image_size) for listing in listings)
    return Source(source, info, load, records, parts)


def decode_image(path: str | os.PathLike[str], image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Reads one file: upright by its EXIF tag, RGB, shorter side resized, centre crop.

    Args:
      path: a file in one of `IMAGE_FORMATS`; of an animation, the first frame.
      image_size: S, the side of the result in pixels.

    Raises:
      InputError: the file cannot be decoded.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} are more than {MAX_PIXELS} pixels"
                )
            if image.mode[0] in "IF":  # Pillow would clip 16-bit grey to white
                raise ValueError("more than 8 bits per channel")
            return square(ImageOps.exif_transpose(image), image_size)
    except Exception as error:  # on corrupt data Pillow's decoders raise almost anything
        unknown = isinstance(error, UnidentifiedImageError)  # whose message is but the path
        reason = f"is none of {', '.join(IMAGE_FORMATS)}" if unknown else first_line(error)
        rule = f"cannot be decoded as an image: {reason}"
        raise InputError("data.source", os.fspath(path), rule) from error


def _read_split(top: Path, listing: _Listing, image_size: int, skipped: list[InputError]) -> Split:
    """Decodes files; those that are no images are added to `skipped`, and are not in the split."""
    images, kept, errors = read_all(FolderRecords(listing.files, image_size))
    skipped += errors
    names = tuple(os.path.relpath(listing.files[i], top) for i in kept)
    return Split(images, listing.labels[kept], names)


def _list_classes(source: str, top: Path, root: Path, skipped: list[InputError]) -> _Listing:
    folders = _sub_folders(root)
    if {folder.name for folder in folders} <= {"train", *TEST_FOLDERS}:
        raise InputError("data.source", source, f"{root} must hold one sub-folder per class")
    files, labels = [], []
    for label, folder in enumerate(folders):
        images, num_skipped = [], len(skipped)
        outside = not _is_within(top, folder.path)
        for entry in _visible(folder):
            if Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if outside or (entry.is_symlink() and not _is_within(top, entry.path)):
                rule = "is a link out of the folder"
                skipped.append(InputError("data.source", entry.path, rule))
            elif not entry.is_file():  # to open a pipe would be to wait
                skipped.append(InputError("data.source", entry.path, "is no file"))
            else:
                images.append(entry.path)
        if not images:
            rule = f"there is no image in {folder.path}{_first(skipped[num_skipped:])}"
            raise InputError("data.source", source, rule)
        files += images
        labels += [label] * len(images)
    class_names = tuple(folder.name for folder in folders)
    return _Listing(class_names, files, np.array(labels, np.int32))


def _first(skipped: list[InputError]) -> str:
    """Why the first of them was skipped, in brackets."""
    return "".join(f" ({error.value} {error.rule})" for error in skipped[:1])


def _is_within(top: Path, path: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(top)


def _sub_folders(folder: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in _visible(folder) if entry.is_dir()] if folder.is_dir() else []


def _visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Lists a folder by name, without hidden entries such as the `._*` files of macOS."""
    with os.scandir(folder) as entries:
        visible = itertools.filterfalse(lambda entry: entry.name.startswith("."), entries)
        return sorted(visible, key=lambda entry: entry.name)
