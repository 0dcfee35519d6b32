"""One line that says which images of a source are used, and what is not used and why."""

from collections.abc import Sequence
from typing import NamedTuple

from hjepa_jax.runtime.names import escaped

NUM_NAMED = 3  # names per reason, and classes


class Unused(NamedTuple):
    """A part of a source that is not used.

    Attributes:
      name: of a file (relative to its folder), an array or a split. A name that ends in "/" stands
        for a folder and everything in it.
      reason: why it is not used, in a few words.
    """

    name: str
    reason: str


def usage_line(
    source: str, train: str, test: str, class_names: Sequence[str], unused: Sequence[Unused]
) -> str:
    """Returns the line.

    Args:
      source: the value of `data.source`.
      train: how many training images there are, and where they come from.
      test: the same of the test images.
      class_names: the classes.
      unused: everything else that is in the source.
    """
    classes = _some(class_names, len(class_names))
    count = f"{len(class_names)} class" + ("es" if len(class_names) != 1 else "")
    line = f"{source}: train {train}; test {test}; {count} ({classes})"
    if unused:
        by_reason: dict[str, list[str]] = {}
        for name, reason in unused:
            by_reason.setdefault(reason, []).append(name)
        groups = [f"{len(x)} {reason} ({_some(x, len(x))})" for reason, x in by_reason.items()]
        line += f"; not used: {', '.join(groups)}"
    return escaped(line)


def _some(names: Sequence[str], count: int) -> str:
    more = ", ..." if count > NUM_NAMED else ""
    return ", ".join(map(escaped, names[:NUM_NAMED])) + more
