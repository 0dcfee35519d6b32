"""Logistic regression by L-BFGS, in coordinates that make the problem well conditioned.

For any weights and each class, the Hessian of the mean cross-entropy is at most X^T X / (2 n)
(Boehning). With the penalty added, this bound has a Cholesky factorization A = L L^T. In the
coordinates U = L^T W the bound is the identity. L-BFGS (SciPy) runs on the host; loss and gradient
are two matrix products on the device.

References:
  Boehning 1992, "Multinomial logistic regression algorithm" (Ann. Inst. Statist. Math. 44): the
  Hessian is at most (I - 11^T / C) / 2 (x) X^T X; we drop the -11^T / C, which only loosens it.
  Zhu et al. 1997, "Algorithm 778: L-BFGS-B" (ACM Trans. Math. Softw. 23).
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int32, Integer
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

# A fit ends when no component of the gradient is larger, in nats per unit of the coordinates above.
TOLERANCE = 3e-5
_MEMORY = 20  # number of corrections that L-BFGS stores
_CHUNK_ROWS = 4096  # bounds temporary memory on the host: 50 MB at D = 3072


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """A logistic regression: `logits = (x - mean) @ kernel + bias`.

    `converged` is True if the gradient fell below `TOLERANCE`.
    """

    mean: Float32[np.ndarray, " D"]
    kernel: Float32[np.ndarray, "D C"]
    bias: Float32[np.ndarray, " C"]
    converged: bool


def fit(
    x: Float[np.ndarray, "n D"],
    y: Integer[np.ndarray, " n"],
    *,
    num_classes: int,
    l2: float,
    num_iterations: int = 1000,
) -> LinearModel:
    """Minimises mean cross-entropy + l2 / 2 * ||W||^2 on standardised features.

    Features are standardised by their own mean and standard deviation; the bias is not penalised.
    scikit-learn's `C` is 1 / (n * l2). Memory: about two copies of `x`, plus 16 * n * C bytes.

    A fit ends if every component of the gradient is below `TOLERANCE`, or after `num_iterations`.
    """
    problem = Problem(x, y, num_classes, num_iterations)
    return problem.model(*problem.minimize(l2, problem.zeros))


def predict(model: LinearModel, x: Float[np.ndarray, "n D"]) -> Int32[np.ndarray, " n"]:
    """Returns the most likely class of each row."""
    predictions = np.empty(len(x), np.int32)
    for rows in row_chunks(len(x)):
        predictions[rows] = ((x[rows] - model.mean) @ model.kernel + model.bias).argmax(axis=1)
    return predictions


class Problem:
    """The regression of classes on standardised features, with its data on the device.

    The last feature is the constant 1, for the bias. The others are centred, so they are orthogonal
    to it.
    """

    def __init__(
        self,
        x: Float[np.ndarray, "n D"],
        y: Integer[np.ndarray, " n"],
        num_classes: int,
        num_iterations: int,
    ):
        n, d = x.shape
        self._mean, self._std, correlation = _moments(x)
        features = np.ones((n, d + 1), np.float32)
        for rows in row_chunks(n):
            np.divide(x[rows] - self._mean, self._std, out=features[rows, :d])
        self._bound = np.eye(d + 1)
        self._bound[:d, :d] = correlation
        self._bound /= 2
        self._penalised = (np.arange(d + 1) < d).astype(np.float64)
        self._data = jax.device_put((features, y.astype(np.int32)))
        self._num_iterations = num_iterations
        self.zeros = np.zeros((d + 1, num_classes))

    def minimize(
        self, l2: float, start: Float64[np.ndarray, "D1 C"]
    ) -> tuple[Float64[np.ndarray, "D1 C"], bool]:
        """Returns the weights for one penalty, and whether the fit converged."""
        penalty = l2 * self._penalised
        factor = _cholesky(self._bound, penalty)
        solve = functools.partial(solve_triangular, factor, lower=True, check_finite=False)

        def weights_at(flat: Float64[np.ndarray, " P"]) -> Float64[np.ndarray, "D1 C"]:
            return solve(flat.reshape(start.shape), trans=1)

        def objective(flat: Float64[np.ndarray, " P"]) -> tuple[float, np.ndarray]:
            weights = weights_at(flat)
            losses, gradient = jax.device_get(_losses(*self._data, weights.astype(np.float32)))
            # The sum over rows and the penalty are float64: L-BFGS compares nearly equal values.
            value = losses.mean(dtype=np.float64) + np.sum(penalty[:, None] * weights**2) / 2
            gradient = gradient + penalty[:, None] * weights
            return float(value), solve(gradient).ravel()

        limits = {"maxiter": self._num_iterations, "maxfun": 2 * self._num_iterations}
        # L-BFGS works on short vectors. More BLAS threads would only take cores from the device.
        with threadpool_limits(1, user_api="blas"):
            found = minimize(
                objective,
                (factor.T @ start).ravel(),
                jac=True,
                method="L-BFGS-B",
                options={"gtol": TOLERANCE, "ftol": 0.0, "maxcor": _MEMORY, **limits},
            )
            return weights_at(found.x), bool(np.abs(found.jac).max() <= TOLERANCE)

    def model(self, weights: Float64[np.ndarray, "D1 C"], converged: bool = True) -> LinearModel:
        """Returns the model with these weights, converted to features before standardisation."""
        weights = weights.astype(np.float32)
        return LinearModel(self._mean, weights[:-1] / self._std[:, None], weights[-1], converged)


@jax.jit
def _losses(
    features: Float32[Array, "n D1"], labels: Int32[Array, " n"], weights: Float32[Array, "D1 C"]
) -> tuple[Float32[Array, " n"], Float32[Array, "D1 C"]]:
    """Returns the cross-entropy of each row, and the gradient of their mean."""
    # "highest": by default some accelerators multiply float32 with 8 or 11 significant bits.
    logits = jnp.matmul(features, weights, precision="highest")
    log_p = jax.nn.log_softmax(logits, axis=1)
    truth = labels[:, None] == jnp.arange(weights.shape[1])[None]
    residual = (jnp.exp(log_p) - truth) / len(labels)
    gradient = jnp.matmul(features.T, residual, precision="highest")
    return -jnp.sum(jnp.where(truth, log_p, 0.0), axis=1), gradient


def _cholesky(
    bound: Float64[np.ndarray, "D1 D1"], penalty: Float64[np.ndarray, " D1"]
) -> Float64[np.ndarray, "D1 D1"]:
    """Returns the Cholesky factor of bound + penalty + floor.

    The floor makes directions without variance positive despite rounding errors of the bound. It
    only changes the scale of the coordinates, not the result of a fit.
    """
    floor = 1e-6 * np.linalg.norm(bound)
    while True:
        with contextlib.suppress(np.linalg.LinAlgError):
            return cholesky(bound + np.diag(penalty + floor), lower=True)
        floor *= 10


def _moments(
    x: Float[np.ndarray, "n D"],
) -> tuple[Float32[np.ndarray, " D"], Float32[np.ndarray, " D"], Float32[np.ndarray, "D D"]]:
    """Returns mean, standard deviation and correlations. Constant features have deviation 1."""
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    covariance = np.zeros((x.shape[1], x.shape[1]), np.float32)
    for rows in row_chunks(len(x)):
        centred = (x[rows] - mean).astype(np.float32)
        covariance += centred.T @ centred
    covariance /= len(x)
    std = divisible_std(np.sqrt(np.diag(covariance)), mean)
    return mean, std, covariance / std[:, None] / std


def divisible_std(
    std: Float[np.ndarray, " D"], mean: Float[np.ndarray, " D"]
) -> Float[np.ndarray, " D"]:
    """Returns `std`, with 1 for constant features: their deviation is only rounding error."""
    return np.where(std > np.finfo(np.float32).eps * np.abs(mean), std, np.float32(1))


def row_chunks(n: int) -> list[slice]:
    """Returns slices of bounded length that cover n rows."""
    return [slice(start, start + _CHUNK_ROWS) for start in range(0, n, _CHUNK_ROWS)]
