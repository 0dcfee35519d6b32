"""The test images: which part of a source they are, or which images are held out for them."""

import re
from typing import Literal

import numpy as np
from jaxtyping import Int, Shaped

from hjepa_jax.data.base import Split
from hjepa_jax.errors import InputError

Role = Literal["train", "test", "val"]
# Names of a split, in any case. The first name of a role takes precedence over the second.
NAMES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation", "dev"),
}
# A name may end like this: `Test-Images`, `training_set`.
_ENDING = re.compile(r"[ _-]?(set|data|images|split)$")
# The held-out images do not depend on the seed of a run: scores of all seeds are comparable.
_SEED = 0
_BLOCK_BYTES = 2**24


def split_role(name: str) -> tuple[Role, int] | None:
    """Returns the role of a split or a folder with this name, and the rank of the name in it."""
    base = _ENDING.sub("", name.lower())
    for role, names in NAMES.items():
        if base in names:
            return role, names.index(base)
    return None


def num_held_out(source: str, num_examples: int) -> int:
    """Returns how many images are held out for the test: a tenth, and at least one.

    Raises:
      InputError: there are fewer than two images.
    """
    if num_examples < 2:
        raise InputError("data.source", source, "one image cannot be split into train and test")
    return max(1, num_examples // 10)


def draw_test_rows(
    source: str, labels: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " held"]]:
    """Draws a stratified tenth of the images; the same images give the same tenth.

    Each class gives a tenth of its images, rounded down or up. It is rounded up for the classes
    that would have no test image, then for those with the largest remainder. At least one image of
    each class is kept. Negative labels stand for images without a label: they are all kept.

    Args:
      source: the value of `data.source`, for the error.
      labels: label of each image.

    Returns:
      Rows of training and of test images, both sorted.

    Raises:
      InputError: no class has two images.
    """
    total = num_held_out(source, len(labels))
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    quota = counts * total / max(1, counts.sum())
    held = np.minimum(np.floor(quota).astype(int), counts - 1)
    order = np.lexsort((-(quota - held), held > 0))  # by the last key first
    can_give = [i for i in order if held[i] + 1 < counts[i]]
    held[can_give[: max(0, total - held.sum())]] += 1
    if not held.sum():
        rule = "no class has two images, so that no test image can be held out; add a folder or"
        raise InputError("data.source", source, f"{rule} arrays with test images")
    rng, rows = np.random.default_rng(_SEED), []
    for label, number in zip(classes, held, strict=True):
        rows.append(rng.permutation(np.flatnonzero(labels == label))[:number])
    test = np.sort(np.concatenate(rows))
    return np.setdiff1d(np.arange(len(labels)), test), test


def hold_out_test(source: str, split: Split) -> tuple[Split, Split]:
    """Splits into train and test, see `draw_test_rows`, and takes over the memory of `split`.

    `split.images` is overwritten: a copy would need the memory of the data set once more.

    Raises:
      InputError: see `draw_test_rows`.
    """
    kept, held = draw_test_rows(source, split.labels)
    names = [tuple(split.names[i] for i in rows) if split.names else () for rows in (kept, held)]
    test = Split(split.images[held], split.labels[held], names[1])
    return Split(keep_rows(split.images, kept), split.labels[kept], names[0]), test


def keep_rows(
    array: Shaped[np.ndarray, "n ..."], rows: Int[np.ndarray, " kept"]
) -> Shaped[np.ndarray, "kept ..."]:
    """Returns `array[rows]` in the memory of `array`, which is overwritten; `rows` are sorted."""
    if len(rows) == len(array):
        return array
    block = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(rows), block):
        # Row i moves to the front (rows[i] >= i), so that no row is overwritten before it is read.
        moved = array[rows[start : start + block]]
        array[start : start + len(moved)] = moved
    return array[: len(rows)]
