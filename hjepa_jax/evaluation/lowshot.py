"""Low-shot probe: how far a handful of labels goes. Ridge regression to one-hot labels.

Closed form, hence exact and quick enough to repeat over many draws of the labelled rows.

    result = lowshot_probe(train_x, train_y, test_x, test_y, num_classes=10)
    for row in result:
        print(row.labels, f"{row.top1:.3f} +- {row.top1_std:.3f}")

References:
  Hoerl and Kennard 1970, "Ridge regression", eq. 2.1; the labels asked for are those of Assran et
  al. 2022, "Masked Siamese networks" (arXiv 2204.07141), section 5, at one's own choice.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int, Integer

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import progress
from hjepa_jax.evaluation.labelled import check_splits, choose, edge_note, hold_out
from hjepa_jax.evaluation.linear import divisible_std, row_chunks

# Labels per class, as whole numbers, and fractions of all training labels.
DEFAULT_SHOTS: tuple[int | float, ...] = (1, 5, 10, 50, 0.01, 0.1)
DEFAULT_ALPHAS = tuple(float(f"{10 ** (e / 2):.3g}") for e in range(-4, 11))


@dataclasses.dataclass(frozen=True)
class LowshotResult:
    """Outcome for one number of labels, over all draws.

    Attributes:
      labels: "5 per class" or "1 %".
      num_labels: labelled rows of a draw.
      top1: mean over draws of the accuracy on the test set, fraction in [0, 1].
      top1_std: its sample standard deviation over draws.
      chosen_alpha: the penalty, chosen on held-out training rows for all draws together; the
        largest, of equals, but an end of those tried only if it is alone.
      val_top1: the held-out score of that penalty, mean over draws.
      per_seed: test accuracy of each draw.
      at_edge: a note if the chosen penalty is an end of those tried.
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

    Features are standardised by the mean and standard deviation of all training rows, which needs
    no label. The penalty is chosen on the held-out training rows, so those labels are used, for
    that one number. A draw never contains a held-out row.

    Args:
      train_x: features `[n, D]`.
      train_y: classes `[n]` in [0, num_classes).
      test_x: features `[num_test, D]`.
      test_y: classes `[num_test]`; read only to score the final predictions.
      num_classes: number of classes.
      shots: labels per class (whole numbers) or fractions of `n` (below 1), drawn class by class in
        equal numbers, or in the proportions of the training set.
      num_draws: draws per entry of `shots`; draw i takes seed + i.
      alphas: penalties to choose from, > 0; see `fit_ridge`.
      num_val: training rows held out to choose; at most a fifth of them is taken.
      seed: of the hold-out and of the first draw.
      what: name of the work, for a progress bar; empty for none.

    Returns:
      One result per entry of `shots`, in order.

    Raises:
      InputError: for arrays that do not match, or a class with fewer rows than asked for
        ("--lowshot_labels").
    """
    check_splits(train_x, train_y, test_x, test_y, num_classes=num_classes)
    fit_rows, val_rows = hold_out(len(train_x), num_val=num_val, seed=seed)
    mean = train_x.mean(axis=0, dtype=np.float64).astype(np.float32)
    # In chunks, so that no second copy of all rows is made.
    squares = sum(np.sum((train_x[c] - mean) ** 2, axis=0) for c in row_chunks(len(train_x)))
    std = divisible_std(np.sqrt(squares / len(train_x)), mean)

    def standardized(x: np.ndarray) -> np.ndarray:
        return (x - mean) / std

    val_z, test_z = standardized(train_x[val_rows]), standardized(test_x)

    results = []
    for shot in progress(what, len(shots), unit=" sizes", iterable=shots):
        val_top1, test_top1, num_labels = [], [], 0
        for draw in range(num_draws):
            rows = draw_labels(train_y, fit_rows, shot, num_classes=num_classes, seed=seed + draw)
            num_labels = len(rows)
            kernels, biases = fit_ridge(
                standardized(train_x[rows]), train_y[rows], num_classes=num_classes, alphas=alphas
            )
            val_top1.append(_scores(kernels, biases, val_z, train_y[val_rows]))
            test_top1.append(_scores(kernels, biases, test_z, test_y))
        mean_val = np.mean(val_top1, axis=0)
        largest_first = np.argsort(alphas)[::-1]
        best, at_edge = choose(mean_val[largest_first].tolist())
        chosen = int(largest_first[best])
        per_seed = np.array(test_top1)[:, chosen]
        results.append(
            LowshotResult(
                labels=f"{shot} per class" if shot >= 1 else f"{100 * shot:g} %",
                num_labels=num_labels,
                top1=float(per_seed.mean()),
                top1_std=float(per_seed.std(ddof=1)) if num_draws > 1 else 0.0,
                chosen_alpha=alphas[chosen],
                val_top1=float(mean_val[chosen]),
                per_seed=tuple(per_seed.tolist()),
                at_edge=(edge_note("alpha", alphas[chosen], alphas),) if at_edge else (),
            )
        )
    return results


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
      shot: labels per class, or (below 1) the fraction of the n rows, at least one per class.
      num_classes: number of classes.
      seed: the same seed draws the same rows.

    Raises:
      InputError: when a class has fewer rows than asked for ("--lowshot_labels").
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
    """Minimises ||Y - X W - b||^2 + alpha ||W||^2 over W and b, Y one-hot, for each alpha.

    One eigendecomposition, of the smaller of X^T X and X X^T, serves all penalties. The bias is not
    penalised.

    Args:
      x: features.
      y: classes in [0, num_classes).
      num_classes: C.
      alphas: the A penalties, > 0, in squared units of the features.

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
    """Accuracy of each penalty's predictions."""
    a, d, c = kernels.shape
    flat = kernels.transpose(1, 0, 2).reshape(d, a * c).astype(np.float32)
    predicted = (x @ flat).reshape(len(x), a, c) + biases.astype(np.float32)
    return (predicted.argmax(axis=-1) == y[:, None]).mean(axis=0)
