"""The line on stderr that says which images of a source are used, which are not, and why."""

from collections.abc import Sequence
from typing import NamedTuple

from hjepa_jax.runtime.names import escaped

NUM_NAMED = 3  # names per reason, and class names


class Unused(NamedTuple):
    """A part of a source that is not used.

    Attributes:
      name: name of a file (relative to the data set), an array or a split. A name that ends in "/"
        stands for a folder and all its files.
      reason: a few words.
    """

    name: str
    reason: str


def usage_line(
    source: str,
    train: str,
    test: str,
    class_names: Sequence[str],
    unused: Sequence[Unused],
    *,
    note: str = "",
) -> str:
    """Returns the line; `train` and `test` give number and origin of the images."""
    classes = "no labels"
    if class_names:
        plural = "es" if len(class_names) > 1 else ""
        classes = f"{len(class_names)} class{plural} ({_first_names(class_names)})"
    line = f"{source}: train {train}; test {test}; {classes}"
    return escaped(line + not_used(unused) + (f"; {note}" if note else ""))


def not_used(unused: Sequence[Unused]) -> str:
    """Returns the end of a line that names unused parts; "" if all is used."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in unused:
        by_reason.setdefault(reason, []).append(name)
    groups = [f"{len(x)} {reason} ({_first_names(x)})" for reason, x in by_reason.items()]
    return f"; not used: {', '.join(groups)}" if groups else ""


def _first_names(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NUM_NAMED else ""
    return ", ".join(map(escaped, names[:NUM_NAMED])) + more
