"""Shared parts of the probes: checks of labelled features, the hold-out, the choice from a grid."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from hjepa_jax.data.base import Split
from hjepa_jax.data.rows import Rows, draw_rows
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.quality import check_features

MIN_ROWS = 5  # minimum size of a training set: a fifth is held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Outcome of a probe; accuracies are fractions in [0, 1].

    Attributes:
      top1: accuracy on the test set, with the chosen setting.
      val_top1: held-out scores of all settings, in the order of the grid.
      test_predictions: predicted classes `[num_test]`.
      at_edge: notes if a chosen value is an end of its grid.
    """

    top1: float
    val_top1: tuple[float, ...]
    test_predictions: Int32[np.ndarray, " num_test"]
    at_edge: tuple[str, ...]


def why_no_probe(train: Split, class_names: Sequence[str]) -> str:
    """Returns why these images cannot be used by probes that need labels; "" if they can."""
    if train.labels is None or not class_names:
        return "has no labels"
    return "has one class" if len(class_names) == 1 else ""


def check_labelled(
    split: str, x: np.ndarray, y: np.ndarray, *, num_classes: int, width: int | None = None
) -> None:
    """Refuses features `[n, D]` and labels `[n]` that do not match.

    Errors name `{split}_x` or `{split}_y`. `width` is the required D; None = any.
    """
    check_features(f"{split}_x", x)
    if width is not None and x.shape[1] != width:
        raise InputError(f"{split}_x", x.shape, f"must have the {width} columns of train_x")
    if y.shape != (len(x),):
        raise InputError(f"{split}_y", y.shape, f"must be one label per row of {split}_x, {len(x)}")
    if y.min() < 0 or y.max() >= num_classes:
        found = (int(y.min()), int(y.max()))
        raise InputError(f"{split}_y", found, f"must lie in [0, {num_classes})")


def check_splits(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    num_classes: int,
) -> None:
    """Applies `check_labelled` to both splits, which must have the same width."""
    check_labelled("train", train_x, train_y, num_classes=num_classes)
    check_labelled("test", test_x, test_y, num_classes=num_classes, width=train_x.shape[1])


def hold_out(n: int, *, num_val: int, seed: int = 0) -> Rows:
    """Splits training rows into rows to fit and held-out rows to choose a hyper-parameter.

    At most a fifth of the rows is held out; the same seed holds out the same rows.

    Raises:
      InputError: no row could be held out.
    """
    num_val = min(num_val, n // MIN_ROWS)
    if num_val < 1:
        raise InputError("train_x", f"{n} rows", f"must have at least {MIN_ROWS}, to hold some out")
    return draw_rows(n, num_val, seed=seed)


def choose(
    scores: Sequence[float], *, open_start: bool = True, open_end: bool = True
) -> tuple[int, bool]:
    """Chooses the setting of a grid with the best held-out score.

    Args:
      scores: one per setting, in the order of the grid.
      open_start: whether settings before the first could be better. False if none exist: there are
        no fewer neighbours than 1.
      open_end: the same for the last setting.

    Returns:
      The index of the best score, and whether it is at an open end of the grid. Among equal scores
      the first that is not at an open end wins, or else the first.
    """
    best = [i for i, score in enumerate(scores) if score == max(scores)]
    ends = set()
    if len(scores) > 1:  # with a single setting nothing is chosen
        ends = {0} if open_start else set()
        ends |= {len(scores) - 1} if open_end else set()
    inner = [i for i in best if i not in ends]
    return (inner or best)[0], not inner


def edge_note(name: str, value: float, tried: Sequence[float]) -> str:
    """Returns a note that the chosen value is an end of the grid: "l2 1e-10 is the smallest"."""
    which = "smallest" if value == min(tried) else "largest"
    return f"{name} {value:g} is the {which} tried, a better one may lie beyond"
