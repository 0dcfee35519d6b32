"""The test images of a source: a separate split, or held-out images."""

import os
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32, Shaped

from hjepa_jax.data.base import Split
from hjepa_jax.data.rows import Rows, draw_test_rows

Role = Literal["train", "test", "val"]
# Names of a split, in any case. The first name of a role has precedence over the second.
NAMES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation", "dev"),
}
# Optional end of a name: `Test-Images`, `training_set`.
_ENDING = re.compile(r"[ _-]?(set|data|images|split)$")
_BLOCK_BYTES = 2**24


def split_role(name: str) -> tuple[Role, int] | None:
    """Returns the role of a split with this name, and the rank of the name within the role."""
    base = _ENDING.sub("", name.lower())
    for role, names in NAMES.items():
        if base in names:
            return role, names.index(base)
    return None


def hold_out_test(source: str, split: Split) -> tuple[Split, Split]:
    """Splits into train and test by `draw_test`, in the memory of `split.images`.

    `split.images` is overwritten: a copy would double the memory of the data set.
    """
    kept, held = draw_test(source, len(split.images), split.labels, split.names)
    names = [tuple(split.names[i] for i in rows) if split.names else () for rows in (kept, held)]
    labels = [None if split.labels is None else split.labels[rows] for rows in (kept, held)]
    test = Split(split.images[held], labels[1], names[1])
    return Split(keep_rows(split.images, kept), labels[0], names[0]), test


def draw_test(
    source: str, count: int, labels: Int32[np.ndarray, " n"] | None, names: Sequence[str]
) -> Rows:
    """Draws the test images by `draw_test_rows`.

    Without labels, the top folders of the files are used as classes. So `images:<path>` holds out
    the same images as `folder:<path>`.

    Args:
      source: name of the source, for errors.
      count: number of images.
      labels: their labels; None = none.
      names: names of their files; empty = none.
    """
    if labels is None:
        labels = np.zeros(count, np.int32)
        tops = [name.partition(os.sep)[0] if os.sep in name else "" for name in names]
        if tops and len(set(tops)) <= count // 2:  # else most folders hold one image
            labels = np.unique(tops, return_inverse=True)[1].astype(np.int32)
    return draw_test_rows(source, labels)


def keep_rows(
    array: Shaped[np.ndarray, "n ..."], rows: Int[np.ndarray, " kept"]
) -> Shaped[np.ndarray, "kept ..."]:
    """Returns `array[rows]` for sorted rows, in the memory of `array`, which is overwritten."""
    if len(rows) == len(array):
        return array
    block = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(rows), block):
        # Rows only move to the front (rows[i] >= i), so every row is read before it is overwritten.
        moved = array[rows[start : start + block]]
        array[start : start + len(moved)] = moved
    return array[: len(rows)]
