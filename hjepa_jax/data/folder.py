"""The `folder:<path>` source: one sub-folder of image files per class.

A file that is no image does not end a run: it is left out, and named in a line on stderr. A class
is never left out, however: a class without an image is refused. `folder_files` has the rules.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from hjepa_jax.data.base import Source, SourceInfo, Split, square, streams
from hjepa_jax.data.folder_files import IMAGE_FORMATS, FolderListing, Listing, list_folder
from hjepa_jax.data.records import (
    NOT_STREAMED,
    Labelled,
    Streaming,
    read_all,
    report_skipped,
    stamps_of,
)
from hjepa_jax.data.test_split import draw_test_rows, hold_out_test
from hjepa_jax.data.usage import usage_line
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.runtime.names import escaped

# Where Pillow, too, begins to suspect a decompression bomb; it refuses only at twice as many.
MAX_PIXELS = 2**30 // 12


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
    source: str, root: Path, image_size: int, streaming: Streaming = NOT_STREAMED
) -> Source:
    """Opens `folder:<path>`; see `hjepa_jax.data.sources.open_source`."""
    if not root.is_dir():
        raise InputError("data.source", source, "must name a folder that exists")
    listing = list_folder(source, root)
    whole = listing.splits[0]
    splits = listing.splits
    if len(splits) == 1:
        splits = [whole.part(rows) for rows in draw_test_rows(source, whole.labels)]
    usage = _usage(source, listing, splits)
    if streams(streaming, len(whole.files), (image_size, image_size, 3)):
        return _open_streamed(source, listing.top, splits, image_size, streaming, usage)

    def load() -> tuple[Split, Split]:
        skipped: list[InputError] = []
        loaded = [_read_split(listing.top, each, image_size, skipped) for each in listing.splits]
        for split, listed in zip(loaded, listing.splits, strict=True):
            for label in np.setdiff1d(listed.labels, split.labels)[:1]:
                reason = "".join(f" ({error.value} {error.rule})" for error in skipped[:1])
                rule = f"there is no image left in class {whole.class_names[label]}{reason}"
                raise InputError("data.source", source, rule)
        # Drawn from images that can be read, so that a bad file does not empty the test set.
        train, test = loaded if len(loaded) == 2 else hold_out_test(source, loaded[0])
        report_skipped(source, skipped, f"{sum(len(each.files) for each in splits)} files")
        return train, test

    num_train, num_test = (len(each.files) for each in splits)
    shape = (image_size, image_size, 3)
    info = SourceInfo(num_train, num_test, shape, whole.class_names)
    parts = tuple(_labelled(listing.top, each, image_size) for each in listing.splits)
    return Source(source, info, load, parts=parts, usage=usage)


def _usage(source: str, listing: FolderListing, splits: list[Listing]) -> str:
    train, test = (f"{len(each.files)} files" for each in splits)
    names = listing.split_names
    train += f" in {names[0]}/" if names else ""
    test += f" in {names[1]}/" if len(names) == 2 else " held out, by class"
    return usage_line(source, train, test, splits[0].class_names, listing.unused)


def _open_streamed(
    source: str,
    top: str,
    listings: list[Listing],
    image_size: int,
    streaming: Streaming,
    usage: str,
) -> Source:
    """A folder whose training images are read while they are trained on."""
    labelled = [
        listing.part(streaming.draw_labelled(np.arange(len(listing.files)))) for listing in listings
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
    parts = tuple(_labelled(top, listing, image_size) for listing in listings)
    return Source(source, info, load, records, parts, usage)


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
        raise InputError("data.source", escaped(os.fspath(path)), rule) from error


def _labelled(top: str, listing: Listing, image_size: int) -> Labelled:
    records = FolderRecords(listing.files, image_size)
    return Labelled(records, listing.labels, _names(top, listing.files))


def _names(top: str, files: Sequence[str]) -> tuple[str, ...]:
    return tuple(escaped(os.path.relpath(path, top)) for path in files)


def _read_split(top: str, listing: Listing, image_size: int, skipped: list[InputError]) -> Split:
    """Decodes files; those that are no images are added to `skipped`, and are not in the split."""
    images, kept, errors = read_all(FolderRecords(listing.files, image_size))
    skipped += errors
    return Split(images, listing.labels[kept], _names(top, [listing.files[i] for i in kept]))
