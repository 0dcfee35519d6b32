"""Images that a user names on the command line: a data source, or files, folders and arrays."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hjepa_jax.data.base import Source
from hjepa_jax.data.folder import records_of_files
from hjepa_jax.data.folder_files import list_images
from hjepa_jax.data.given import parts_of
from hjepa_jax.data.image_file import why_no_image
from hjepa_jax.data.records import Labelled
from hjepa_jax.data.sides import Sides
from hjepa_jax.data.usage import not_used
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.names import escaped
from hjepa_jax.runtime.paths import local_path

FLAG = "--input"
_KINDS = "must be an image, a folder of images, a .npz or .npy file, tfds:<name> or shapes"


class Given(NamedTuple):
    """One value of the flag.

    Attributes:
      value: the text of the user.
      kind: "image", "folder", "images", "npz", "npy", "tfds" or "shapes".
      path: path of the file or folder; for "tfds" and "shapes" the value itself.
    """

    value: str
    kind: str
    path: Path

    @property
    def source(self) -> str:
        """The value in the form of a `data.source`."""
        return self.value if self.kind in ("tfds", "shapes") else f"{self.kind}:{self.path}"


class Inputs(NamedTuple):
    """The images of all values.

    Attributes:
      name: name of the inputs, for messages.
      parts: the images in the order given.
      has_split: whether the first part has training images, and the second part test images. If
        there is no second part, the test images must be drawn.
    """

    name: str
    parts: tuple[Labelled, ...]
    has_split: bool


def check_input(value: str) -> Given:
    """Returns kind and path of a value of the flag.

    Raises:
      InputError: there is no such file, or it has another format ("--input").
    """
    kind, _, rest = value.partition(":")
    if (kind == "tfds" and rest) or (value == "shapes" and not local_path(FLAG, value).exists()):
        return Given(value, kind, Path(value))
    if kind in ("folder", "images", "npz", "npy") and rest and local_path(FLAG, rest).exists():
        return Given(value, kind, local_path(FLAG, rest))
    path = local_path(FLAG, value)
    if path.is_dir():
        return Given(value, "folder", path)
    reason = "there is no such file"
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".npz", ".npy"):
            return Given(value, suffix[1:], path)
        reason = why_no_image(str(path))
        if not reason:
            return Given(value, "image", path)
        reason = f"this is {reason}"
    raise InputError(FLAG, value, f"{_KINDS}; {reason}")


def open_inputs(
    given: Sequence[Given],
    open_one: Callable[[str], Source],
    *,
    image_size: Sides,
    num_channels: int,
    follow_links: bool = False,
) -> Inputs:
    """Opens one data source with its split, or any other inputs as one list without labels.

    Args:
      given: from `check_input`, at least one.
      open_one: opens a `data.source`.
      image_size: pixels of the images from files; see `open_source`.
      num_channels: channels of the images.
      follow_links: whether links out of a folder are followed.

    Raises:
      InputError: if an input cannot be read, or breaks a rule of its format ("--input").
    """
    if len(given) == 1 and given[0].kind != "image":
        return Inputs(given[0].source, _open(given[0], open_one), True)
    parts: list[Labelled] = []
    files: list[tuple[str, str]] = []  # paths and names of consecutive files

    def add_files() -> None:
        if files:
            paths, names = zip(*files, strict=True)
            records, _ = _named(
                names[0], records_of_files, names[0], [*paths], image_size, num_channels
            )
            parts.append(Labelled(records, None, tuple(map(escaped, names))))
            files.clear()

    for each in given:
        if each.kind == "image":
            files.append((os.path.abspath(each.path), each.value))
        elif each.kind in ("folder", "images"):
            files += _files_of(each, follow_links)
        else:
            add_files()
            found = _open(each, open_one)
            for role, part in zip(("train", "test"), found, strict=False):
                place = f":{role}" if len(found) > 1 else ""
                rows = range(len(part.images))
                names = tuple(escaped(f"{each.value}{place}[{row}]") for row in rows)
                parts.append(Labelled(part.images, None, names))
    add_files()
    return Inputs(", ".join(each.value for each in given[:3]), tuple(parts), False)


def _open(given: Given, open_one: Callable[[str], Source]) -> tuple[Labelled, ...]:
    source = _named(given.value, open_one, given.source)
    if source.records is not None and not source.parts:
        raise InputError(FLAG, given.value, "is too large for memory; write it as image files")
    return source.parts or parts_of(*_named(given.value, source.load))


def _files_of(given: Given, follow_links: bool) -> list[tuple[str, str]]:
    """Returns paths and names of all images below a folder; prints the files that are not used."""
    listing = _named(
        given.value, lambda: list_images(given.source, given.path, follow_links=follow_links)
    )
    (images,) = listing.splits
    line = f"{given.value}: {len(images.files)} images{not_used(listing.unused)}"
    print(escaped(line), file=sys.stderr, flush=True)
    top = str(given.path)
    return [(path, os.path.join(top, os.path.relpath(path, listing.top))) for path in images.files]


def _named(value: str, function: Callable, *args: object):
    """Calls a function; an InputError is raised again with the value of the flag."""
    try:
        return function(*args)
    except InputError as error:
        where = "" if error.value in (value, *args) else f"{error.value} "
        raise InputError(FLAG, value, where + error.rule) from error
