"""Subsets of rows of a data set: random ones, evenly spaced ones, and the held-out test images."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from hjepa_jax.errors import InputError


class Rows(NamedTuple):
    """Sorted row numbers: the rows to keep, and the rows that are held out."""

    kept: Int[np.ndarray, " kept"]
    held: Int[np.ndarray, " held"]


def draw_rows(n: int, count: int, *, seed: int = 0) -> Rows:
    """Draws `count` of `n` rows (at most all); the same arguments draw the same rows."""
    order = np.random.default_rng(seed).permutation(n)
    return Rows(np.sort(order[count:]), np.sort(order[:count]))


def spread_rows(rows: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " m"]:
    """Returns at most `count` of the rows, evenly spaced from the first to the last.

    Many sources are sorted by class, so that their first rows do not contain the last classes.
    """
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def num_held_out(source: str, num_examples: int) -> int:
    """Returns the number of images that are held out for the test: a tenth, at least one."""
    if num_examples < 2:
        raise InputError("data.source", source, "one image cannot be split into train and test")
    return max(1, num_examples // 10)


def draw_test_rows(source: str, labels: Int[np.ndarray, " n"]) -> Rows:
    """Draws a stratified tenth of the images; the same labels give the same tenth.

    Each class gives a tenth of its images, rounded down or up. Rounded up first: classes that
    would have no test image, then classes with the largest remainder. At least one image of each
    class is kept. Images with a negative label (no label) are kept.

    The rows do not depend on the seed of a run, so that scores of different seeds are comparable.
    """
    total = num_held_out(source, len(labels))
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    quota = counts * total / max(1, counts.sum())
    held = np.minimum(np.floor(quota).astype(int), counts - 1)
    order = np.lexsort((-(quota - held), held > 0))  # the last key has precedence
    can_give = [i for i in order if held[i] + 1 < counts[i]]
    held[can_give[: max(0, total - held.sum())]] += 1
    if not held.sum():
        rule = "no class has two images, so that no test image can be held out; add a folder or"
        raise InputError("data.source", source, f"{rule} arrays with test images")
    rng = np.random.default_rng(0)
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(classes, held, strict=True)
    ]
    test = np.sort(np.concatenate(drawn))
    return Rows(np.setdiff1d(np.arange(len(labels)), test), test)
