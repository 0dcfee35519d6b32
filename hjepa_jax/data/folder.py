"""The sources `folder:<path>`, with a sub-folder per class, and `images:<path>`, without labels.

An unreadable image is skipped and named on stderr. A class without any readable image is refused.
`folder_files` decides which files are used.
"""

import collections
import contextlib
import dataclasses
import functools
import os
from pathlib import Path

import numpy as np
from jaxtyping import Num

from hjepa_jax.data.base import Source, SourceInfo, Split, is_streamed
from hjepa_jax.data.folder_files import FolderListing, Listing, list_folder
from hjepa_jax.data.image_file import (
    MULTI_IMAGE_SUFFIXES,
    RGB,
    Kind,
    decode_image,
    kind_of,
    sides_of,
)
from hjepa_jax.data.pixels import channels_of, with_channels
from hjepa_jax.data.records import (
    NOT_STREAMED,
    Labelled,
    Streaming,
    read_all,
    report_skipped,
    stamps_of,
)
from hjepa_jax.data.rows import draw_rows, spread_rows
from hjepa_jax.data.sides import SAMPLE, Sides, pair, stored_sides
from hjepa_jax.data.test_split import draw_test, hold_out_test
from hjepa_jax.data.usage import usage_line
from hjepa_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """Image files, resized to one size; see `hjepa_jax.data.records.Records`."""

    files: list[str]
    image_size: Sides
    kind: Kind = RGB
    num_channels: int = 3  # grey values are repeated if the files have one channel

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (*pair(self.image_size), self.num_channels)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> Num[np.ndarray, "S T C"]:
        image = decode_image(self.files[row], self.image_size, self.kind)
        return with_channels(image[None], self.num_channels)[0]

    def stamps(self) -> list[tuple[str, int, int]]:
        ends = (min(self.files), max(self.files))  # their common folder is common to all files
        shared = len(os.path.commonpath([os.path.dirname(path) for path in ends]))
        return stamps_of(self.files, [path[shared:] for path in self.files])


def open_folder(
    source: str,
    root: Path,
    image_size: Sides,
    streaming: Streaming = NOT_STREAMED,
    *,
    follow_links: bool = False,
    num_channels: int | None = 3,
    stored_area: float = 1.0,
) -> Source:
    """Opens `folder:<path>` or `images:<path>`; see `hjepa_jax.data.sources.open_source`."""
    if not root.is_dir():
        hint = f"; did you mean npz:{root}?" if root.is_file() else ""
        raise InputError("data.source", source, f"must name a folder that exists{hint}")
    is_labelled = source.startswith("folder:")
    listing = list_folder(source, root, labelled=is_labelled, follow_links=follow_links)
    sample, sizes = records_of_files(source, listing.splits[0].files, image_size, num_channels)
    kind, num_channels = sample.kind, sample.num_channels
    records_of = functools.partial(dataclasses.replace, sample)
    stored = stored_sides(sizes, image_size, stored_area)
    originals_of = functools.partial(records_of, image_size=stored)
    splits, shape = listing.splits, (*pair(image_size), num_channels)
    whole = splits[0]
    if len(splits) == 1:
        rows = draw_test(source, len(whole.files), whole.labels, whole.names(listing.top))
        splits = [whole.part(part) for part in rows]
    usage = _usage(source, listing, splits, kind)
    if is_streamed(streaming, len(whole.files), (*stored, num_channels), kind.dtype):
        limit = streaming.max_labelled
        read = [each.part(draw_rows(len(each.files), limit).held) for each in splits]
        records, parts = originals_of(files=splits[0].files), splits
    else:
        # The test images are drawn among readable images: bad files must not empty the test set.
        read, records, parts = listing.splits, None, listing.splits

    def load() -> tuple[Split, Split]:
        skipped: list[InputError] = []
        loaded = [
            _read_split(listing.top, each, records_of(files=each.files), skipped) for each in read
        ]
        if records is None:
            _check_classes(source, loaded, read, skipped)
        train, test = loaded if len(loaded) == 2 else hold_out_test(source, loaded[0])
        report_skipped(source, skipped, f"{sum(len(each.files) for each in read)} files")
        return train, test

    def originals(train: Split) -> Num[np.ndarray, "n H W C"]:
        files = dict(zip(whole.names(listing.top), whole.files, strict=True))
        images, _, errors = read_all(originals_of(files=[files[name] for name in train.names]))
        if errors:  # a file that was readable before
            raise errors[0]
        return images

    num_train, num_test = (len(each.files) for each in (splits if records is None else read))
    info = SourceInfo(num_train, num_test, shape, whole.class_names, kind.dtype)
    labelled = tuple(
        Labelled(records_of(files=x.files), x.labels, x.names(listing.top)) for x in parts
    )
    again = None if records is not None or stored == pair(image_size) else originals
    return Source(source, info, load, records, labelled, usage, stored, again)


def records_of_files(
    source: str, files: list[str], image_size: Sides, num_channels: int | None
) -> tuple[FolderRecords, list[tuple[int, int]]]:
    """Returns the records of image files, of their most frequent kind, and the (H, W) of some.

    Raises:
      InputError: they have another number of channels than `num_channels`; see `channels_of`.
    """
    kind, sizes = _sample(files, num_channels)
    channels = channels_of(source, kind.num_channels, num_channels)
    return FolderRecords(files, image_size, kind, channels), sizes


def _sample(files: list[str], num_channels: int | None) -> tuple[Kind, list[tuple[int, int]]]:
    """Returns the most frequent kind of evenly spaced files, and their sides.

    Files of another kind are skipped later.
    """
    kinds, sizes = collections.Counter(), []
    for row in spread_rows(np.arange(len(files)), SAMPLE):
        with contextlib.suppress(Exception):  # decoders raise almost anything on corrupt data
            kinds[kind_of(files[row], num_channels)] += 1
            sizes.append(sides_of(files[row]))
    return kinds.most_common(1)[0][0] if kinds else RGB, sizes


def _usage(source: str, listing: FolderListing, splits: list[Listing], kind: Kind) -> str:
    train, test = (f"{len(each.files)} files" for each in splits)
    names = listing.split_names
    train += f" in {names[0]}/" if names else ""
    by = ", by class" if splits[0].class_names else ""
    test += f" in {names[1]}/" if len(names) == 2 else f" held out{by}"
    several = () if kind.num_channels not in (1, 3) else MULTI_IMAGE_SUFFIXES
    count = sum(path.lower().endswith(several) for x in splits for path in x.files)
    note = f"{count} GIF or TIFF files: only the first image of each is used" if count else ""
    return usage_line(source, train, test, splits[0].class_names, listing.unused, note=note)


def _check_classes(
    source: str, loaded: list[Split], listed: list[Listing], skipped: list[InputError]
) -> None:
    """Refuses a split or a class that has files, but no readable image."""
    for split, listing in zip(loaded, listed, strict=True):
        reason = "".join(f" ({error.value} {error.rule})" for error in skipped[:1])
        if split.labels is None or listing.labels is None:
            if not len(split.images):
                raise InputError("data.source", source, f"there is no image left{reason}")
            continue
        for label in np.setdiff1d(listing.labels, split.labels)[:1]:
            rule = f"there is no image left in class {listing.class_names[label]}{reason}"
            raise InputError("data.source", source, rule)


def _read_split(
    top: str, listing: Listing, records: FolderRecords, skipped: list[InputError]
) -> Split:
    """Decodes the files of a split; appends the errors of unreadable files to `skipped`."""
    images, rows, errors = read_all(records)
    skipped += errors
    read = listing.part(np.array(rows, int))
    return Split(images, read.labels, read.names(top))
