"""Linear probe: logistic regression on frozen features, without a learning rate to choose.

The objective is convex, so the result depends only on the penalty. Penalties are fitted from the
strongest to the weakest, and each fit starts from the result of the last one. See `logistic`.

>>> rng = np.random.default_rng(0)
>>> y = np.arange(300) % 3
>>> x = np.eye(3, dtype=np.float32)[y] + rng.normal(0, 0.2, (300, 3)).astype(np.float32)
>>> result = linear_probe(x[:200], y[:200], x[200:], y[200:], num_classes=3)
>>> result.top1 > 0.95, result.converged
(True, True)
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import progress
from hjepa_jax.evaluation.labelled import ProbeResult, check_splits, choose, edge_note, hold_out
from hjepa_jax.evaluation.logistic import Problem, fit, predict

# Half-decades. While the best penalty is an end of the grid, more are tried, up to `L2_LIMITS`.
DEFAULT_L2_GRID = tuple(float(f"{10 ** (e / 2):.3g}") for e in range(-12, 3))
L2_LIMITS = (1e-10, 1e3)
_MORE_PENALTIES = 2  # penalties tried at a time beyond an end: a single one may lose by chance


@dataclasses.dataclass(frozen=True)
class LinearProbeResult(ProbeResult):
    """Outcome of the linear probe.

    Attributes:
      chosen_l2: the penalty. Among equal scores the largest that is not an end of the grid.
      l2_grid: the penalties that were tried, descending; `val_top1` has their scores.
      converged: whether the final fit reached `logistic.TOLERANCE`.
    """

    chosen_l2: float
    l2_grid: tuple[float, ...]
    converged: bool


def linear_probe(
    train_x: Float[np.ndarray, "_ _"],
    train_y: Integer[np.ndarray, " _"],
    test_x: Float[np.ndarray, "_ _"],
    test_y: Integer[np.ndarray, " _"],
    *,
    num_classes: int,
    l2_grid: Sequence[float] = DEFAULT_L2_GRID,
    num_val: int = 5000,
    seed: int = 0,
    num_iterations: int = 1000,
    what: str = "",
) -> LinearProbeResult:
    """Chooses the penalty on held-out training rows, refits on all rows, scores the test once.

    Args:
      train_x: features `[n, D]`.
      train_y: classes `[n]` in [0, num_classes).
      test_x: features `[num_test, D]`.
      test_y: classes `[num_test]`; read only to score the final predictions.
      num_classes: number of classes.
      l2_grid: penalties to choose from, > 0, in nats; see `choose_l2`.
      num_val: training rows held out for the choice; at most a fifth is taken.
      seed: seed of the hold-out.
      num_iterations: upper limit for each penalty; see `logistic.fit`.
      what: title of the progress bar; empty = none.

    Raises:
      InputError: features are empty or not finite, arrays do not match, labels are out of range, or
        the grid is bad ("l2_grid").
    """
    check_splits(train_x, train_y, test_x, test_y, num_classes=num_classes)
    options = {"num_classes": num_classes, "num_iterations": num_iterations}
    l2, scores, at_edge = choose_l2(
        train_x, train_y, l2_grid=l2_grid, num_val=num_val, seed=seed, what=what, **options
    )
    model = fit(train_x, train_y, l2=l2, **options)
    predictions = predict(model, test_x)
    return LinearProbeResult(
        top1=float((predictions == test_y).mean()),
        val_top1=tuple(scores.values()),
        test_predictions=predictions,
        at_edge=at_edge,
        chosen_l2=l2,
        l2_grid=tuple(scores),
        converged=model.converged,
    )


def choose_l2(
    x: Float[np.ndarray, "n D"],
    y: Integer[np.ndarray, " n"],
    *,
    num_classes: int,
    l2_grid: Sequence[float] = DEFAULT_L2_GRID,
    num_val: int = 5000,
    seed: int = 0,
    num_iterations: int = 1000,
    what: str = "",
) -> tuple[float, dict[float, float], tuple[str, ...]]:
    """Chooses the penalty with the best accuracy on held-out training rows.

    While the best penalty is an end of the grid, more penalties are tried beyond it, with the ratio
    of the last two, up to `L2_LIMITS`. Arguments as in `linear_probe`.

    Returns:
      The penalty, all held-out scores by penalty (descending), and a note if it is an end.
    """
    if not l2_grid or min(l2_grid) <= 0:
        raise InputError("l2_grid", tuple(l2_grid), "needs penalties, all > 0")
    fit_rows, val_rows = hold_out(len(x), num_val=num_val, seed=seed)
    problem = Problem(x[fit_rows], y[fit_rows], num_classes, num_iterations)
    val_x, val_y = x[val_rows], y[val_rows]
    scores: dict[float, float] = {}

    with progress(what, len(l2_grid), unit=" penalties") as bar:

        def score(l2s: Sequence[float], start: np.ndarray) -> np.ndarray:
            """Scores penalties, the strongest first; returns the weights of the last."""
            for l2 in l2s:
                start, _ = problem.minimize(l2, start)
                scores[l2] = float((predict(problem.model(start), val_x) == val_y).mean())
                bar.update(1)
            return start

        weakest = score(sorted(l2_grid, reverse=True), problem.zeros)
        while True:
            grid = sorted(scores, reverse=True)
            best, at_edge = choose([scores[l2] for l2 in grid])
            more = _beyond(grid, best) if at_edge else []
            if not more:
                break
            if best == 0:
                score(more, problem.zeros)
            else:
                weakest = score(more, weakest)
    notes = (edge_note("l2", grid[best], grid),) if at_edge else ()
    return grid[best], {l2: scores[l2] for l2 in grid}, notes


def _beyond(grid: Sequence[float], end: int) -> list[float]:
    """Returns more penalties beyond one end of a descending grid, within `L2_LIMITS`."""
    inner = grid[1] if end == 0 else grid[end - 1]
    ratio = grid[end] / inner
    more = [float(f"{grid[end] * ratio**k:.3g}") for k in range(1, _MORE_PENALTIES + 1)]
    low, high = L2_LIMITS
    inside = (l2 for l2 in more if low * 0.99 < l2 < high * 1.01)
    return sorted(inside, reverse=True)
