"""Linear probe: logistic regression on frozen features, with no learning rate to choose.

The objective is convex, so the result depends on the penalty and on nothing else. Penalties are
fitted one after the other, from the strongest to the weakest, and each fit starts where the last
one ended.

    result = linear_probe(train_x, train_y, test_x, test_y, num_classes=10)
    print(result.top1, result.chosen_l2)

The method is L-BFGS (of SciPy, on the host) in coordinates in which the problem is round. Boehning
bounds the Hessian of the mean cross-entropy, for any weights and each class, by X^T X / (2 n). In
the PCA basis of the features that bound is diagonal, so each weight is measured in units of one
over the square root of its curvature. Loss and gradient are two matrix products on the device.

References:
  Boehning 1992, "Multinomial logistic regression algorithm" (Ann. Inst. Statist. Math. 44): the
  Hessian is at most (I - 11^T / C) / 2 (x) X^T X; we drop the -11^T / C, which only loosens it.
  Zhu et al. 1997, "Algorithm 778: L-BFGS-B" (ACM Trans. Math. Softw. 23).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int32, Integer
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import progress
from hjepa_jax.evaluation.labelled import check_splits, choose, edge_note, hold_out

# Half-decades. While the best penalty is an end of them, more are tried, up to `L2_LIMITS`.
DEFAULT_L2_GRID = tuple(float(f"{10 ** (e / 2):.3g}") for e in range(-12, 3))
L2_LIMITS = (1e-10, 1e3)

# A fit ends when no component of the gradient is larger, in nats per unit of the coordinates above.
TOLERANCE = 3e-5
_MEMORY = 20  # gradients that L-BFGS remembers
_MORE_PENALTIES = 2  # tried at a time beyond an end: a single one might lose by chance
_CHUNK_ROWS = 4096  # bounds the host's temporaries: 50 MB at D = 3072


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """Logistic regressions for G penalties: `logits = (x - mean) @ kernel + bias`.

    `converged` says of each whether its gradient fell below `TOLERANCE`.
    """

    mean: Float32[np.ndarray, " D"]
    kernel: Float32[np.ndarray, "D C G"]
    bias: Float32[np.ndarray, "C G"]
    converged: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The choice of a penalty on held-out rows.

    Attributes:
      l2: the penalty that scored best; of equals the largest, but an end of the grid only if it is
        alone.
      grid: the penalties that were tried, descending.
      val_top1: their held-out scores.
      at_edge: a note if the chosen penalty is an end of the grid.
    """

    l2: float
    grid: tuple[float, ...]
    val_top1: tuple[float, ...]
    at_edge: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LinearProbeResult:
    """Outcome of the linear probe; accuracies are fractions in [0, 1].

    Attributes:
      top1: accuracy on the test set.
      chosen_l2: see `Selection`.
      l2_grid: the penalties that were tried, descending.
      val_top1: their held-out scores.
      at_edge: a note if the chosen penalty is an end of the grid.
      converged: whether the final fit reached `TOLERANCE`.
      train_top1: accuracy of the final model on the rows it was fitted to.
      test_predictions: predicted classes `[num_test]`.
    """

    top1: float
    chosen_l2: float
    l2_grid: tuple[float, ...]
    val_top1: tuple[float, ...]
    at_edge: tuple[str, ...]
    converged: bool
    train_top1: float
    test_predictions: Int32[np.ndarray, " num_test"]


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
    """Chooses the penalty on held-out training rows, refits on all of them, scores the test once.

    Args:
      train_x: features `[n, D]`.
      train_y: classes `[n]` in [0, num_classes).
      test_x: features `[num_test, D]`.
      test_y: classes `[num_test]`; read only to score the final predictions.
      num_classes: number of classes.
      l2_grid: penalties to choose from, > 0, in nats; see `select`.
      num_val: training rows held out to choose; at most a fifth of them is taken.
      seed: of the hold-out.
      num_iterations: upper limit for each penalty; see `fit`.
      what: name of the work, for a progress bar; empty for none.

    Raises:
      InputError: for features that are empty or not finite, arrays that do not match, labels out
        of range, or a bad grid ("l2_grid").
    """
    check_splits(train_x, train_y, test_x, test_y, num_classes=num_classes)
    options = {"num_classes": num_classes, "num_iterations": num_iterations, "what": what}
    chosen = select(train_x, train_y, l2_grid=l2_grid, num_val=num_val, seed=seed, **options)
    model = fit(train_x, train_y, l2s=[chosen.l2], **options)
    predictions = predict(model, test_x)[0]
    return LinearProbeResult(
        top1=float((predictions == test_y).mean()),
        chosen_l2=chosen.l2,
        l2_grid=chosen.grid,
        val_top1=chosen.val_top1,
        at_edge=chosen.at_edge,
        converged=model.converged[0],
        train_top1=float((predict(model, train_x)[0] == train_y).mean()),
        test_predictions=predictions,
    )


def select(
    x: Float[np.ndarray, "n D"],
    y: Integer[np.ndarray, " n"],
    *,
    num_classes: int,
    l2_grid: Sequence[float] = DEFAULT_L2_GRID,
    num_val: int = 5000,
    seed: int = 0,
    num_iterations: int = 1000,
    what: str = "",
) -> Selection:
    """Chooses the penalty that classifies held-out training rows best.

    Args:
      x: training features.
      y: classes in [0, num_classes).
      num_classes: number of classes.
      l2_grid: penalties to begin with; see `fit`. While the best of several is an end, more are
        tried beyond it, at the distance of the last two, up to `L2_LIMITS`.
      num_val: rows to hold out; at most a fifth of `n` is taken.
      seed: of the hold-out.
      num_iterations: upper limit for each penalty; see `fit`.
      what: name of the work, for a progress bar; empty for none.

    Raises:
      InputError: if the grid is bad, or there are fewer than 5 rows.
    """
    _check_grid(l2_grid)
    fit_rows, val_rows = hold_out(len(x), num_val=num_val, seed=seed)
    problem = _Problem(x[fit_rows], y[fit_rows], num_classes, num_iterations)
    val_x, val_y = x[val_rows], y[val_rows]
    scores: dict[float, float] = {}

    with progress(what, len(l2_grid), unit=" penalties") as bar:

        def score(l2s: Sequence[float], start: np.ndarray) -> np.ndarray:
            """Scores some penalties, from the strongest on; returns the weights of the last."""
            for l2 in l2s:
                start, _ = problem.minimize(l2, start)
                model = problem.model([start], [True])
                scores[l2] = float((predict(model, val_x)[0] == val_y).mean())
                bar.update(1)
            return start

        weakest = score(sorted(l2_grid, reverse=True), problem.zeros)
        while True:
            grid = sorted(scores, reverse=True)
            val_top1 = [scores[l2] for l2 in grid]
            best, at_edge = choose(val_top1)
            more = _beyond(grid, best) if at_edge else []
            if not more:
                break
            if best == 0:
                score(more, problem.zeros)
            else:
                weakest = score(more, weakest)
    notes = (edge_note("l2", grid[best], grid),) if at_edge else ()
    return Selection(grid[best], tuple(grid), tuple(val_top1), notes)


def _check_grid(l2s: Sequence[float]) -> None:
    if not l2s or min(l2s) <= 0:
        raise InputError("l2_grid", tuple(l2s), "needs penalties, all > 0")


def _beyond(grid: Sequence[float], end: int) -> list[float]:
    """More penalties beyond one end of a descending grid, within `L2_LIMITS`; descending."""
    inner = grid[1] if end == 0 else grid[end - 1]
    ratio = grid[end] / inner
    more = [float(f"{grid[end] * ratio**k:.3g}") for k in range(1, _MORE_PENALTIES + 1)]
    low, high = L2_LIMITS
    inside = (l2 for l2 in more if low * 0.99 < l2 < high * 1.01)
    return sorted(inside, reverse=True)


def fit(
    x: Float[np.ndarray, "n D"],
    y: Integer[np.ndarray, " n"],
    *,
    num_classes: int,
    l2s: Sequence[float],
    num_iterations: int = 1000,
    what: str = "",
) -> LinearModel:
    """Minimises mean cross-entropy + l2 / 2 * ||W||^2 for each l2, on standardised features.

    Features are standardised by their own mean and standard deviation; the bias is not penalised.
    scikit-learn's `C` is 1 / (n * l2). Memory: about two copies of `x`, plus 16 * n * C bytes.

    Args:
      x: training features.
      y: classes in [0, num_classes).
      num_classes: C.
      l2s: the G penalties, > 0.
      num_iterations: upper limit for each. A fit ends earlier once every component of the gradient
        is below `TOLERANCE`.
      what: name of the work, for a progress bar; empty for none.

    Raises:
      InputError: if there is no penalty, or one is not positive ("l2_grid").
    """
    _check_grid(l2s)
    problem = _Problem(x, y, num_classes, num_iterations)
    found, start = {}, problem.zeros
    strongest_first = sorted(l2s, reverse=True)
    for l2 in progress(what, len(l2s), unit=" penalties", iterable=strongest_first):
        start, converged = problem.minimize(l2, start)
        found[l2] = start, converged
    weights, converged = zip(*(found[l2] for l2 in l2s), strict=True)
    return problem.model(weights, converged)


def predict(model: LinearModel, x: Float[np.ndarray, "n D"]) -> Int32[np.ndarray, "G n"]:
    """Returns the most likely class of each row, for each penalty of the model."""
    d, c, g = model.kernel.shape
    predictions = np.empty((g, len(x)), np.int32)
    for rows in row_chunks(len(x)):
        logits = (x[rows] - model.mean) @ model.kernel.reshape(d, c * g)
        predictions[:, rows] = (logits.reshape(-1, c, g) + model.bias).argmax(axis=1).T
    return predictions


class _Problem:
    """The regression of some rows on their classes, in the PCA basis, ready on the device.

    The last feature is the constant 1 of the bias. The others are centred, hence orthogonal to it,
    so the curvature bound stays diagonal.
    """

    def __init__(
        self,
        x: Float[np.ndarray, "n D"],
        y: Integer[np.ndarray, " n"],
        num_classes: int,
        num_iterations: int,
    ):
        n, d = x.shape
        self._mean, self._basis, variance = _pca(x)
        features = np.ones((n, d + 1), np.float32)
        for rows in row_chunks(n):
            np.matmul(x[rows] - self._mean, self._basis, out=features[rows, :d])
        self._curvature = np.append(variance.astype(np.float64), 1.0) / 2
        self._penalised = (np.arange(d + 1) < d).astype(np.float64)
        self._data = jax.device_put((features, y.astype(np.int32)))
        self._num_iterations = num_iterations
        self.zeros = np.zeros((d + 1, num_classes))

    def minimize(
        self, l2: float, start: Float64[np.ndarray, "D1 C"]
    ) -> tuple[Float64[np.ndarray, "D1 C"], bool]:
        """The weights for one penalty, in the PCA basis, and whether the fit converged."""
        penalty = l2 * self._penalised
        scale = 1 / np.sqrt(self._curvature + penalty)[:, None]

        def objective(flat: Float64[np.ndarray, " P"]) -> tuple[float, np.ndarray]:
            weights = flat.reshape(start.shape) * scale
            losses, gradient = jax.device_get(_losses(*self._data, weights.astype(np.float32)))
            # Sums over rows and the penalty in float64: L-BFGS compares values that differ little.
            value = losses.mean(dtype=np.float64) + np.sum(penalty[:, None] * weights**2) / 2
            gradient = (gradient + penalty[:, None] * weights) * scale
            return float(value), gradient.ravel()

        limits = {"maxiter": self._num_iterations, "maxfun": 2 * self._num_iterations}
        # L-BFGS works on short vectors. Threads for them would only wait, and keep the cores from
        # the device's work.
        with threadpool_limits(1, user_api="blas"):
            found = minimize(
                objective,
                (start / scale).ravel(),
                jac=True,
                method="L-BFGS-B",
                options={"gtol": TOLERANCE, "ftol": 0.0, "maxcor": _MEMORY, **limits},
            )
        return found.x.reshape(start.shape) * scale, bool(np.abs(found.jac).max() <= TOLERANCE)

    def model(self, weights: Sequence[np.ndarray], converged: Sequence[bool]) -> LinearModel:
        """The models of some penalties, for features as they were given."""
        stacked = np.stack(weights, axis=-1).astype(np.float32)
        kernel = np.tensordot(self._basis, stacked[:-1], axes=1)
        return LinearModel(self._mean, kernel, stacked[-1], tuple(converged))


@jax.jit
def _losses(
    features: Float32[Array, "n D1"], labels: Int32[Array, " n"], weights: Float32[Array, "D1 C"]
) -> tuple[Float32[Array, " n"], Float32[Array, "D1 C"]]:
    """The cross-entropy of each row, and the gradient of their mean."""
    # "highest": by default some accelerators multiply float32 with 8 or 11 significant bits.
    logits = jnp.matmul(features, weights, precision="highest")
    log_p = jax.nn.log_softmax(logits, axis=1)
    truth = labels[:, None] == jnp.arange(weights.shape[1])[None]
    residual = (jnp.exp(log_p) - truth) / len(labels)
    gradient = jnp.matmul(features.T, residual, precision="highest")
    return -jnp.sum(jnp.where(truth, log_p, 0.0), axis=1), gradient


def _pca(
    x: Float[np.ndarray, "n D"],
) -> tuple[Float32[np.ndarray, " D"], Float32[np.ndarray, "D D"], Float32[np.ndarray, " D"]]:
    """Returns mean, basis, variance: `(x - mean) @ basis` is the PCA of standardised features.

    Constant features stay 0. Variances are raised to float32 resolution, 1e-6 of the largest: the
    curvature bound must not lie below the rounding errors of the data.
    """
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    covariance = np.zeros((x.shape[1], x.shape[1]), np.float32)
    for rows in row_chunks(len(x)):
        centred = (x[rows] - mean).astype(np.float32)
        covariance += centred.T @ centred
    covariance /= len(x)
    std = np.sqrt(np.diag(covariance))
    std = divisible_std(std, mean)
    variance, basis = np.linalg.eigh(covariance / std[:, None] / std)
    return mean, basis / std[:, None], np.maximum(variance, 1e-6 * variance[-1])


def divisible_std(
    std: Float[np.ndarray, " D"], mean: Float[np.ndarray, " D"]
) -> Float[np.ndarray, " D"]:
    """1 in place of standard deviations that are rounding errors of a constant feature."""
    return np.where(std > np.finfo(np.float32).eps * np.abs(mean), std, np.float32(1))


def row_chunks(n: int) -> list[slice]:
    """Cuts n rows into slices of bounded size."""
    return [slice(start, start + _CHUNK_ROWS) for start in range(0, n, _CHUNK_ROWS)]
