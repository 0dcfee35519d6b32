"""The test images of a source: a split of its own, or images that are held out."""

import re
from typing import Literal

import numpy as np
from jaxtyping import Int, Shaped

from hjepa_jax.data.base import Split
from hjepa_jax.data.rows import draw_test_rows

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
    """Splits into train and test by `draw_test_rows`, in the memory of `split.images`.

    `split.images` is overwritten: a copy would double the memory of the data set.
    """
    kept, held = draw_test_rows(source, split.labels)
    names = [tuple(split.names[i] for i in rows) if split.names else () for rows in (kept, held)]
    test = Split(split.images[held], split.labels[held], names[1])
    return Split(keep_rows(split.images, kept), split.labels[kept], names[0]), test


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
