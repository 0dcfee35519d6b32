"""Images that are decoded one by one: files, records of a TFDS set, or arrays that a user passes.

A source offers `Records` for training data that does not fit into memory. Threads and worker
processes read them.
"""

import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Num

from hjepa_jax.errors import InputError
from hjepa_jax.runtime.names import escaped

READ_AHEAD = 1024  # records per thread pool call: bounds the time that Ctrl-C waits
MAX_WAITING_BYTES = 2**27  # decoded records that wait to be copied to their place
MAX_UNREADABLE = 100  # consecutive unreadable records after which the set is refused as damaged
NUM_LISTED = 3  # skipped records that a message names


@dataclasses.dataclass(frozen=True)
class Streaming:
    """Whether and how a source is streamed.

    Attributes:
      when: "always", "never", or "auto": if the decoded training images do not fit into memory.
      train_split: split of a TFDS set to train on, with or without labels; None = train.
      class_list: file with one class name per line, to which a TFDS set is restricted.
      max_labelled: maximum number of labelled images per split that are kept in memory for probes.
        Every run on the set draws the same images.
    """

    when: str = "never"
    train_split: str | None = None
    class_list: str | None = None
    max_labelled: int = 20_000


NOT_STREAMED = Streaming()


@runtime_checkable
class Images(Protocol):
    """Images of one shape that are read one by one."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def __len__(self) -> int: ...

    def read(self, row: int) -> Num[np.ndarray, "H W C"]:
        """Decodes one image.

        Raises:
          InputError: the image cannot be read; the value names it.
        """
        ...


@runtime_checkable
class Records(Images, Protocol):
    """Images to train on; an instance can be pickled."""

    def stamps(self) -> list[tuple[str, int, int]]:
        """Returns name, bytes and modification time (ns) of every file that holds the images.

        They change when the images do. The names are the same for a copy in another place.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images of a split before decoding; labels (None = none) and names as in `Split`."""

    images: Images
    labels: Int32[np.ndarray, " n"] | None
    names: tuple[str, ...]


def stamps_of(paths: Sequence[str], names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns the stamps of files, see `Records.stamps`; -1 if a file does not exist."""

    def stamps(start: int) -> list[tuple[str, int, int]]:
        rows = range(start, min(start + READ_AHEAD, len(paths)))
        return [(names[row], *_size_and_time(paths[row])) for row in rows]

    with ThreadPoolExecutor() as pool:  # a network file system answers many requests at once
        parts = pool.map(stamps, range(0, len(paths), READ_AHEAD))
        return [stamp for part in parts for stamp in part]


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def read_or_next(records: Records, row: int) -> tuple[Num[np.ndarray, "H W C"], bool]:
    """Reads a row or, if it is unreadable, the next readable row; row 0 follows the last row.

    The result depends only on the set and the row.

    Returns:
      The image, and whether it is the image of `row` itself.

    Raises:
      InputError: `MAX_UNREADABLE` consecutive rows are unreadable.
    """
    last_error, num_tries = None, min(len(records), MAX_UNREADABLE)
    for offset in range(num_tries):
        try:
            return records.read((row + offset) % len(records)), offset == 0
        except InputError as error:
            last_error = error
    assert last_error is not None
    rule = f"nor can any of the {num_tries - 1} before it be read: {last_error.rule}"
    raise InputError(last_error.field, last_error.value, rule)


def read_all(
    records: Records,
) -> tuple[Num[np.ndarray, "n H W C"], list[int], list[InputError]]:
    """Decodes all records in threads.

    Returns:
      The readable images, their rows, and one error for each unreadable row.
    """
    images = np.empty((0, *records.image_shape), np.uint8)
    kept: list[int] = []
    errors: list[InputError] = []
    ahead = max(1, min(READ_AHEAD, MAX_WAITING_BYTES // max(1, 4 * math.prod(records.image_shape))))
    for start in range(0, len(records), ahead):
        rows = range(start, min(start + ahead, len(records)))
        for row, image in zip(rows, _read_in_threads(records, rows), strict=True):
            if isinstance(image, InputError):
                errors.append(image)
            else:
                if not kept:  # the first image determines the type of all
                    images = np.empty((len(records), *records.image_shape), image.dtype)
                images[len(kept)] = image
                kept.append(row)
    return images[: len(kept)], kept, errors


class Decoded:
    """Records that can be sliced like an array; a slice is decoded on access.

    Args:
      images: the records.
      stop_at_error: whether an unreadable record is an error; if not, it is a black image.

    Attributes:
      errors: one for each unreadable row of the slices so far.
    """

    def __init__(self, images: Images, *, stop_at_error: bool = False):
        self._records, self._stop_at_error = images, stop_at_error
        self._dtype = np.dtype(np.uint8)  # of the newest image
        self.errors: dict[int, InputError] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, rows: slice) -> Num[np.ndarray, "n H W C"]:
        wanted = range(*rows.indices(len(self)))
        read = [*_read_in_threads(self._records, wanted)]
        for row, image in zip(wanted, read, strict=True):
            if not isinstance(image, InputError):
                self._dtype = image.dtype
            elif self._stop_at_error:
                raise image
            else:
                self.errors[row] = image
        kinds = {image.dtype.name for image in read if not isinstance(image, InputError)}
        if len(kinds) > 1:  # NumPy would convert them, and their scales differ
            rule = "must all have one type of pixels"
            raise InputError("images", " and ".join(sorted(kinds)), rule)
        black = np.zeros(self._records.image_shape, self._dtype)
        images = [black if isinstance(image, InputError) else image for image in read]
        return np.stack(images) if images else np.zeros((0, *black.shape), self._dtype)


def _read_in_threads(
    records: Images, rows: range
) -> Iterator[Num[np.ndarray, "H W C"] | InputError]:
    def read(row: int) -> np.ndarray | InputError:
        try:
            return records.read(row)
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        # Decoders warn about odd metadata, which does not matter. The filter holds for all threads.
        warnings.simplefilter("ignore")
        yield from pool.map(read, rows)


def unreadable_errors(records: Records, rows: Iterable[int]) -> list[InputError]:
    """Returns one error per row; only rows that a message names are read again for the reason."""
    errors = []
    for i, row in enumerate(sorted(rows)):
        error = InputError("data.source", row, "could not be read")
        if i < NUM_LISTED:
            try:
                records.read(row)
            except InputError as why:
                error = why
        errors.append(error)
    return errors


def report_skipped(source: str, errors: Sequence[InputError], what: str) -> None:
    """Prints one line on stderr about skipped records, if there are any.

    `what` is the number and kind of all records, such as "200 files".
    """
    if not errors:
        return
    named = "; ".join(f"{error.value} {error.rule}" for error in errors[:NUM_LISTED])
    others = f"; and {len(errors) - NUM_LISTED} more" if len(errors) > NUM_LISTED else ""
    line = f"{source}: {len(errors)} of {what} skipped: {named}{others}"
    print(escaped(" ".join(line.split())), file=sys.stderr, flush=True)
