"""Images that are read one by one, while they are trained on: what does not fit the memory.

`Records` are what a source offers for it. They are read in threads, and in worker processes.
"""

import dataclasses
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8

from hjepa_jax.errors import InputError
from hjepa_jax.runtime.names import escaped

READ_AHEAD = 1024  # records handed to the threads at a time: Ctrl-C waits for no more
MAX_WAITING_BYTES = 2**27  # of decoded records that wait for their place
MAX_UNREADABLE = 100  # in a row: then it is not the records that are at fault
NUM_LISTED = 3  # skipped records that are named


@dataclasses.dataclass(frozen=True)
class Streaming:
    """Whether a source is streamed, and what of it.

    Attributes:
      when: "always", "never", or "auto": where the decoded training images would not fit.
      train_split: the split of a TFDS set to train on, which may be without labels; None for train.
      class_list: a file that names one class a line; a TFDS set is restricted to them.
      max_labelled: labelled images of train and test that are kept in memory for probes, at most.
        Every run on the set draws the same ones.
    """

    when: str = "never"
    train_split: str | None = None
    class_list: str | None = None
    max_labelled: int = 20_000

    def draw_labelled(self, rows: np.ndarray) -> np.ndarray:
        """Returns at most `max_labelled` of the rows, in their order."""
        if len(rows) <= self.max_labelled:
            return rows
        drawn = np.random.default_rng(0).permutation(len(rows))[: self.max_labelled]
        return rows[np.sort(drawn)]


NOT_STREAMED = Streaming()


@runtime_checkable
class Images(Protocol):
    """Images of one shape that are read one by one."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def __len__(self) -> int: ...

    def read(self, row: int) -> UInt8[np.ndarray, "H W 3"]:
        """Decodes one image.

        Raises:
          InputError: it cannot be read; its value says which one.
        """
        ...


@runtime_checkable
class Records(Images, Protocol):
    """Images that can be trained on; an instance can be pickled."""

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of last change (ns) of every file that the images come from.

        They change when the images do. Names are the same in a copy or another place.
        """
        ...


def stamps_of(paths: Sequence[str], names: Sequence[str]) -> list[tuple[str, int, int]]:
    """The stamps of files, see `Records.stamps`; -1 for a file that is not there."""

    def stamps(start: int) -> list[tuple[str, int, int]]:
        rows = range(start, min(start + READ_AHEAD, len(paths)))
        return [(names[row], *_size_and_time(paths[row])) for row in rows]

    with ThreadPoolExecutor() as pool:  # a network file system is slow, but answers many at once
        parts = pool.map(stamps, range(0, len(paths), READ_AHEAD))
        return [stamp for part in parts for stamp in part]


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def read_or_next(records: Records, row: int) -> tuple[UInt8[np.ndarray, "H W 3"], bool]:
    """Reads a row; in place of one that cannot be read, the first after it that can.

    After the last row comes the first. So what is read is a function of the set and the row alone.

    Returns:
      The image, and whether it is that of the row itself.

    Raises:
      InputError: none of `MAX_UNREADABLE` in a row can be read.
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
) -> tuple[UInt8[np.ndarray, "n H W 3"], list[int], list[InputError]]:
    """Reads all records with threads: the decoders let go of the interpreter.

    Returns:
      The images that can be read, their rows, and what is wrong with the others.
    """
    images = np.empty((len(records), *records.image_shape), np.uint8)
    kept: list[int] = []
    errors: list[InputError] = []
    ahead = max(1, min(READ_AHEAD, MAX_WAITING_BYTES // max(1, images[:1].nbytes)))
    for start in range(0, len(records), ahead):
        rows = range(start, min(start + ahead, len(records)))
        for row, image in zip(rows, _read_in_threads(records, rows), strict=True):
            if isinstance(image, InputError):
                errors.append(image)
            else:
                images[len(kept)] = image
                kept.append(row)
    return images[: len(kept)], kept, errors


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The images of a split that is not decoded yet, with labels and, if they have any, file names.

    Attributes:
      images: read one by one.
      labels: of each.
      names: of its file.
    """

    images: Images
    labels: Int32[np.ndarray, " n"]
    names: tuple[str, ...]


class Decoded:
    """Images of records as if they were an array: a slice is decoded when it is taken.

    Args:
      records: where they are read from.
      stop_at_error: whether a record that cannot be read is an error. Else it is black.

    Attributes:
      errors: what is wrong with the rows, of those taken so far, that cannot be read.
    """

    def __init__(self, records: Images, *, stop_at_error: bool = False):
        self._records, self._stop_at_error = records, stop_at_error
        self.errors: dict[int, InputError] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, rows: slice) -> UInt8[np.ndarray, "n H W 3"]:
        wanted = range(*rows.indices(len(self)))
        images = np.zeros((len(wanted), *self._records.image_shape), np.uint8)
        for i, image in enumerate(_read_in_threads(self._records, wanted)):
            if not isinstance(image, InputError):
                images[i] = image
            elif self._stop_at_error:
                raise image
            else:
                self.errors[wanted[i]] = image
        return images


def _read_in_threads(
    records: Images, rows: range
) -> Iterator[UInt8[np.ndarray, "H W 3"] | InputError]:
    def read(row: int) -> np.ndarray | InputError:
        try:
            return records.read(row)
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        # Odd metadata: what matters is whether there is a picture. (The filter is every thread's.)
        warnings.simplefilter("ignore")
        yield from pool.map(read, rows)


def unreadable_errors(records: Records, rows: Iterable[int]) -> list[InputError]:
    """What is wrong with each row; only the few that will be named are read again."""
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
    """Says in one line on stderr what was skipped, if anything was.

    Args:
      source: where the records are from.
      errors: one for each record; the first few are named.
      what: of what they are, "200 files".
    """
    if not errors:
        return
    named = "; ".join(f"{error.value} {error.rule}" for error in errors[:NUM_LISTED])
    others = f"; and {len(errors) - NUM_LISTED} more" if len(errors) > NUM_LISTED else ""
    line = f"{source}: {len(errors)} of {what} skipped: {named}{others}"
    print(escaped(" ".join(line.split())), file=sys.stderr, flush=True)
