"""Linear probe: logistic regression on frozen features, with no learning rate to choose.

The objective is convex, so the result depends on the penalty and on nothing else. All penalties of
a grid are fitted at once, in the same matrix products.

    result = linear_probe(train_x, train_y, test_x, test_y, num_classes=10)
    print(result.top1, result.chosen_l2)

The method is accelerated majorise-minimise. Boehning bounds the Hessian of the mean cross-entropy,
for any weights and each class, by X^T X / (2 n). In the PCA basis of the features that bound is
diagonal, so dividing the gradient by it is a step that always descends; Nesterov's momentum,
restarted whenever it points uphill, makes the steps fast.

References:
  Boehning 1992, "Multinomial logistic regression algorithm" (Ann. Inst. Statist. Math. 44): the
  Hessian is at most (I - 11^T / C) / 2 (x) X^T X; we drop the -11^T / C, which only loosens it.
  O'Donoghue and Candes 2012, "Adaptive restart for accelerated gradient schemes"
  (arXiv 1204.3982), section 3.2, the gradient scheme.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Integer

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import progress
from hjepa_jax.evaluation.labelled import check_splits, hold_out

# Half-decades, from next to no penalty to one that leaves little but the class frequencies.
DEFAULT_L2_GRID = tuple(float(f"{10 ** (e / 2):.3g}") for e in range(-12, 3))

_TOLERANCE = 1e-8  # nats: stop once the bound promises less than this per step, for every penalty
_CHUNK_ROWS = 4096  # bounds the host's temporaries: 50 MB at D = 3072


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """Logistic regressions for G penalties: `logits = (x - mean) @ kernel + bias`."""

    mean: Float32[np.ndarray, " D"]
    kernel: Float32[np.ndarray, "D C G"]
    bias: Float32[np.ndarray, "C G"]


@dataclasses.dataclass(frozen=True)
class LinearProbeResult:
    """Outcome of the linear probe; accuracies are fractions in [0, 1].

    Attributes:
      top1: accuracy on the test set.
      chosen_l2: the penalty that scored best on held-out training rows; the largest, of equals.
      val_top1: those held-out scores, one per penalty in the order of the grid.
      train_top1: accuracy of the final model on the rows it was fitted to.
      test_predictions: predicted classes `[num_test]`.
    """

    top1: float
    chosen_l2: float
    val_top1: tuple[float, ...]
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
    num_iterations: int = 300,
    what: str = "",
) -> LinearProbeResult:
    """Chooses the penalty on held-out training rows, refits on all of them, scores the test once.

    Args:
      train_x: features `[n, D]`.
      train_y: classes `[n]` in [0, num_classes).
      test_x: features `[num_test, D]`.
      test_y: classes `[num_test]`; read only to score the final predictions.
      num_classes: number of classes.
      l2_grid: penalties to choose from, > 0, in nats; see `fit`.
      num_val: training rows held out to choose; at most a fifth of them is taken.
      seed: of the hold-out.
      num_iterations: upper limit; see `fit`.
      what: name of the work, for a progress bar; empty for none.

    Raises:
      InputError: for features that are empty or not finite, arrays that do not match, labels out
        of range, or a bad grid ("l2_grid").
    """
    check_splits(train_x, train_y, test_x, test_y, num_classes=num_classes)

    chosen_l2, val_top1 = select(
        train_x,
        train_y,
        num_classes=num_classes,
        l2_grid=l2_grid,
        num_val=num_val,
        seed=seed,
        num_iterations=num_iterations,
        what=what,
    )
    model = fit(
        train_x,
        train_y,
        num_classes=num_classes,
        l2s=[chosen_l2],
        num_iterations=num_iterations,
        what=what,
    )
    train_top1 = float((predict(model, train_x)[0] == train_y).mean())
    predictions = predict(model, test_x)[0]
    top1 = float((predictions == test_y).mean())
    return LinearProbeResult(top1, chosen_l2, val_top1, train_top1, predictions)


def select(
    x: Float[np.ndarray, "n D"],
    y: Integer[np.ndarray, " n"],
    *,
    num_classes: int,
    l2_grid: Sequence[float] = DEFAULT_L2_GRID,
    num_val: int = 5000,
    seed: int = 0,
    num_iterations: int = 300,
    what: str = "",
) -> tuple[float, tuple[float, ...]]:
    """Chooses the penalty that classifies held-out training rows best; the largest, of equals.

    Args:
      x: training features.
      y: classes in [0, num_classes).
      num_classes: number of classes.
      l2_grid: penalties to choose from; see `fit`.
      num_val: rows to hold out; at most a fifth of `n` is taken.
      seed: of the hold-out.
      num_iterations: upper limit; see `fit`.
      what: name of the work, for a progress bar; empty for none.

    Returns:
      The chosen penalty, and the held-out accuracy of each in the order of the grid.

    Raises:
      InputError: if the grid is bad, or there are fewer than 5 rows.
    """
    fit_rows, val_rows = hold_out(len(x), num_val=num_val, seed=seed)
    model = fit(
        x[fit_rows],
        y[fit_rows],
        num_classes=num_classes,
        l2s=l2_grid,
        num_iterations=num_iterations,
        what=what,
    )
    val_top1 = (predict(model, x[val_rows]) == y[None, val_rows]).mean(axis=1).tolist()
    _, chosen_l2 = max(zip(val_top1, l2_grid, strict=True))
    return chosen_l2, tuple(val_top1)


def fit(
    x: Float[np.ndarray, "n D"],
    y: Integer[np.ndarray, " n"],
    *,
    num_classes: int,
    l2s: Sequence[float],
    num_iterations: int = 300,
    what: str = "",
) -> LinearModel:
    """Minimises mean cross-entropy + l2 / 2 * ||W||^2 for each l2, on standardised features.

    Features are standardised by their own mean and standard deviation; the bias is not penalised.
    scikit-learn's `C` is 1 / (n * l2). Memory: about two copies of `x`, plus 12 * n * C * G bytes.

    Args:
      x: training features.
      y: classes in [0, num_classes).
      num_classes: C.
      l2s: the G penalties, > 0.
      num_iterations: upper limit. Stops earlier once the curvature bound promises less than 1e-8
        nats per step for every penalty.
      what: name of the work, for a progress bar; empty for none.

    Raises:
      InputError: if there is no penalty, or one is not positive ("l2_grid").
    """
    if not l2s or min(l2s) <= 0:
        raise InputError("l2_grid", tuple(l2s), "needs penalties, all > 0")
    n, d = x.shape
    mean, basis, variance = _pca(x)
    # The last feature is the constant 1 of the bias. The others are centred, hence orthogonal to
    # it, so the curvature bound stays diagonal.
    features = np.ones((n, d + 1), np.float32)
    for rows in row_chunks(n):
        np.matmul(x[rows] - mean, basis, out=features[rows, :d])
    variance = np.append(variance, 1.0)
    penalty = np.outer(np.arange(d + 1) < d, l2s)
    step_size = 1 / (variance[:, None] / 2 + penalty)
    weights = np.zeros((d + 1, num_classes, len(l2s)), np.float32)
    features, labels, penalty, step_size, state = jax.device_put(
        (
            features,
            y.astype(np.int32),
            penalty[:, None, :].astype(np.float32),
            step_size[:, None, :].astype(np.float32),
            (weights, weights, np.ones(len(l2s), np.float32)),
        )
    )
    # A Python loop, for Metal handles `lax.while_loop` poorly; a step dwarfs its dispatch.
    steps = range(num_iterations)
    for _ in progress(what, num_iterations, unit=" steps at most", iterable=steps):
        state, decrease = _step(features, labels, penalty, step_size, state)
        if jax.device_get(decrease).max() < _TOLERANCE:
            break
    weights = jax.device_get(state[0])
    return LinearModel(mean, np.tensordot(basis, weights[:d], axes=1), weights[d])


def predict(model: LinearModel, x: Float[np.ndarray, "n D"]) -> Int32[np.ndarray, "G n"]:
    """Returns the most likely class of each row, for each penalty of the model."""
    d, c, g = model.kernel.shape
    predictions = np.empty((g, len(x)), np.int32)
    for rows in row_chunks(len(x)):
        logits = (x[rows] - model.mean) @ model.kernel.reshape(d, c * g)
        predictions[:, rows] = (logits.reshape(-1, c, g) + model.bias).argmax(axis=1).T
    return predictions


_State = tuple[Float32[Array, "D1 C G"], Float32[Array, "D1 C G"], Float32[Array, " G"]]


@jax.jit
def _step(
    features: Float32[Array, "n D1"],
    labels: Int32[Array, " n"],
    penalty: Float32[Array, "D1 1 G"],
    step_size: Float32[Array, "D1 1 G"],
    state: _State,
) -> tuple[_State, Float32[Array, " G"]]:
    """Takes one accelerated step for every penalty.

    The penalties are the last axis, where their elementwise work is contiguous.

    Args:
      features: in the PCA basis, the constant 1 last (D1 = D + 1).
      labels: classes in [0, C).
      penalty: l2, and 0 for the bias.
      step_size: reciprocal of the bound on the curvature.
      state: weights, the weights before those, and Nesterov's t >= 1 per penalty.

    Returns:
      The next state, and by how much in nats each objective falls at least in the plain step from
      the extrapolated point: half the squared norm of the gradient in the metric of the bound.
    """
    weights, weights_before, t = state
    d, c, g = weights.shape
    n = len(labels)

    t_next = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
    momentum = ((t - 1) / t_next)[None, None, :]
    ahead = weights + momentum * (weights - weights_before)

    # "highest": by default some accelerators multiply float32 with 8 or 11 significant bits.
    logits = jnp.matmul(features, ahead.reshape(d, c * g), precision="highest").reshape(n, c, g)
    truth = labels[:, None, None] == jnp.arange(c)[None, :, None]
    residual = (jax.nn.softmax(logits, axis=1) - truth).reshape(n, c * g)
    gradient = jnp.matmul(features.T, residual, precision="highest").reshape(d, c, g) / n
    gradient += penalty * ahead

    weights_next = ahead - step_size * gradient
    uphill = jnp.sum(gradient * (weights_next - weights), axis=(0, 1)) > 0
    decrease = jnp.sum(step_size * gradient**2, axis=(0, 1)) / 2
    return (weights_next, weights, jnp.where(uphill, 1.0, t_next)), decrease


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
