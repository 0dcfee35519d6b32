"""Low-shot probe: accuracy with few labels, by ridge regression to one-hot labels.

The solution is exact and in closed form, so it can be repeated over many draws of labelled rows.

    for row in lowshot_probe(train_x, train_y, test_x, test_y, num_classes=10):
        print(row.labels, f"{row.top1:.3f} +- {row.top1_std:.3f}")

References:
  Hoerl and Kennard 1970, "Ridge regression", eq. 2.1. Numbers of labels, by default, after Assran
  et al. 2022, "Masked Siamese networks" (arXiv 2204.07141), section 5.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int, Integer

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import progress
from hjepa_jax.evaluation.labelled import check_splits, choose, edge_note, hold_out
from hjepa_jax.evaluation.logistic import divisible_std, row_chunks

# Whole numbers: labels per class. Below 1: fraction of all training labels.
DEFAULT_SHOTS: tuple[int | float, ...] = (1, 5, 10, 50, 0.01, 0.1)
DEFAULT_ALPHAS = tuple(float(f"{10 ** (e / 2):.3g}") for e in range(-4, 11))


@dataclasses.dataclass(frozen=True)
class LowshotResult:
    """Outcome for one number of labels, over all draws.

    Attributes:
      labels: "5 per class" or "1 %".
      num_labels: labelled rows per draw.
      top1: mean over draws of the accuracy on the test set, fraction in [0, 1].
      top1_std: sample standard deviation of that accuracy over draws.
      chosen_alpha: the penalty, chosen on held-out training rows for all draws together. Among
        equal scores the largest that is not an end of the grid.
      val_top1: held-out score of that penalty, mean over draws.
      per_seed: test accuracy of each draw.
      at_edge: a note if the chosen penalty is an end of the grid.
    """

    labels: str
    num_labels: int
    top1: float
    top1_std: float
    chosen_alpha: float
    val_top1: float
    per_seed: tuple[float, ...]
    at_edge: tuple[str, ...] = ()


def lowshot_probe(
    train_x: Float[np.ndarray, "_ _"],
    train_y: Integer[np.ndarray, " _"],
    test_x: Float[np.ndarray, "_ _"],
    test_y: Integer[np.ndarray, " _"],
    *,
    num_classes: int,
    shots: Sequence[int | float] = DEFAULT_SHOTS,
    num_draws: int = 5,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    num_val: int = 5000,
    seed: int = 0,
    what: str = "",
) -> list[LowshotResult]:
    """Fits ridge regression to a few labels, several times, and scores the test set.

    Features are standardised by mean and standard deviation of all training rows, without labels.
    The penalty is chosen on held-out training rows: their labels are used only for this. A draw
    never contains a held-out row.

    The arguments are those of `linear_probe`, and these:
      shots: numbers of labels, see `draw_labels`.
      num_draws: draws per entry of `shots`. Draw i has the seed `seed + i`.
      alphas: penalties, see `fit_ridge`.

    Returns:
      One result per entry of `shots`, in order.

    Raises:
      InputError: arrays do not match, or a class has too few rows ("--lowshot_labels").
    """
    check_splits(train_x, train_y, test_x, test_y, num_classes=num_classes)
    fit_rows, val_rows = hold_out(len(train_x), num_val=num_val, seed=seed)
    mean, std = _mean_and_std(train_x)
    val = (train_x[val_rows] - mean) / std, train_y[val_rows]
    test = (test_x - mean) / std, test_y

    def score(shot: int | float, draw: int) -> tuple[int, np.ndarray, np.ndarray]:
        rows = draw_labels(train_y, fit_rows, shot, num_classes=num_classes, seed=seed + draw)
        x = (train_x[rows] - mean) / std
        ridge = fit_ridge(x, train_y[rows], num_classes=num_classes, alphas=alphas)
        return len(rows), _scores(*ridge, *val), _scores(*ridge, *test)

    return [
        _summarise(shot, alphas, [score(shot, draw) for draw in range(num_draws)])
        for shot in progress(what, len(shots), unit=" sizes", iterable=shots)
    ]


def _mean_and_std(
    x: Float[np.ndarray, "n D"],
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    # In chunks, so that no second copy of all rows is made.
    squares = sum(np.sum((x[c] - mean) ** 2, axis=0) for c in row_chunks(len(x)))
    return mean, divisible_std(np.sqrt(squares / len(x)), mean)


def _summarise(
    shot: int | float, alphas: Sequence[float], draws: list[tuple[int, np.ndarray, np.ndarray]]
) -> LowshotResult:
    """Chooses the penalty for all draws (num_labels, val_top1 [A], test_top1 [A]) of one size."""
    mean_val = np.mean([val for _, val, _ in draws], axis=0)
    largest_first = np.argsort(alphas)[::-1]
    best, at_edge = choose(mean_val[largest_first].tolist())
    chosen = int(largest_first[best])
    per_seed = np.array([test for _, _, test in draws])[:, chosen]
    return LowshotResult(
        labels=f"{shot} per class" if shot >= 1 else f"{100 * shot:g} %",
        num_labels=draws[-1][0],
        top1=float(per_seed.mean()),
        top1_std=float(per_seed.std(ddof=1)) if len(draws) > 1 else 0.0,
        chosen_alpha=alphas[chosen],
        val_top1=float(mean_val[chosen]),
        per_seed=tuple(per_seed.tolist()),
        at_edge=(edge_note("alpha", alphas[chosen], alphas),) if at_edge else (),
    )


def draw_labels(
    y: Integer[np.ndarray, " n"],
    rows: Int[np.ndarray, " fit"],
    shot: int | float,
    *,
    num_classes: int,
    seed: int,
) -> Int[np.ndarray, " labelled"]:
    """Draws the labelled rows, class by class and without replacement.

    Args:
      y: classes of all training rows.
      rows: rows that may be drawn.
      shot: number of labels per class; or (below 1) fraction of the rows of each class, at least
        one row.
      num_classes: number of classes.
      seed: the same seed draws the same rows.

    Raises:
      InputError: a class has fewer rows ("--lowshot_labels").
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for label in range(num_classes):
        candidates = rows[y[rows] == label]
        count = shot if shot >= 1 else max(1, round(shot * np.sum(y == label)))
        if count > len(candidates):
            rule = f"class {label} has only {len(candidates)} training images to draw from"
            raise InputError("--lowshot_labels", shot, rule)
        drawn.append(rng.choice(candidates, size=int(count), replace=False))
    return np.concatenate(drawn)


def fit_ridge(
    x: Float[np.ndarray, "n D"],
    y: Integer[np.ndarray, " n"],
    *,
    num_classes: int,
    alphas: Sequence[float],
) -> tuple[Float64[np.ndarray, "A D C"], Float64[np.ndarray, "A C"]]:
    """Minimises ||Y - X W - b||^2 + alpha ||W||^2 over W and b, with one-hot Y, for each alpha.

    The bias is not penalised. One eigendecomposition, of the smaller of X^T X and X X^T, gives the
    solution for all A penalties `alphas`, which are > 0, in squared units of the features.

    Returns:
      Kernels and biases: class scores are `x @ kernel + bias`.
    """
    mean, targets = x.mean(axis=0, dtype=np.float64), np.eye(num_classes)[y]
    prior = targets.mean(axis=0)
    centred = x - mean
    n, d = x.shape
    # (X^T X + alpha)^-1 X^T Y = X^T (X X^T + alpha)^-1 Y
    if n <= d:
        squares, basis = np.linalg.eigh(centred @ centred.T)
        left, right = centred.T @ basis, basis.T @ (targets - prior)
    else:
        squares, basis = np.linalg.eigh(centred.T @ centred)
        left, right = basis, basis.T @ (centred.T @ (targets - prior))
    shrink = 1.0 / (np.maximum(squares, 0.0) + np.asarray(alphas)[:, None])  # [A, r]
    kernels = np.einsum("dr,ar,rc->adc", left, shrink, right, optimize=True)
    return kernels, prior - mean @ kernels


def _scores(
    kernels: Float64[np.ndarray, "A D C"],
    biases: Float64[np.ndarray, "A C"],
    x: Float[np.ndarray, "n D"],
    y: Integer[np.ndarray, " n"],
) -> Float64[np.ndarray, " A"]:
    """Returns the accuracy of each penalty."""
    a, d, c = kernels.shape
    flat = kernels.transpose(1, 0, 2).reshape(d, a * c).astype(np.float32)
    predicted = (x @ flat).reshape(len(x), a, c) + biases.astype(np.float32)
    return (predicted.argmax(axis=-1) == y[:, None]).mean(axis=0)
