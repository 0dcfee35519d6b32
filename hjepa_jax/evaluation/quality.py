"""Label-free quality of a representation: rank and spread of a feature matrix, in float64.

A representation can fail in two ways (Jing et al. 2021, arXiv 2110.09348). *Complete* collapse maps
every image to one point. *Dimensional* collapse uses only a few directions. The loss shows neither.

    verdict = collapse_verdict(features)  # features [n, D]
    print(verdict.label, verdict.effective_rank)
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64

from hjepa_jax.errors import InputError

MIN_RELATIVE_STD = 0.01
MIN_RANK_FRACTION = 0.1

ALPHA_RANKS = (4, 100)  # first and last rank of the spectrum that `alpha_req` fits
ALPHA_FLOOR = 1e-6  # fraction of the largest eigenvalue

# Features are float32: a spread below this fraction of their magnitude is rounding error.
_RESOLUTION = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether features have collapsed, with the values and thresholds that decide it.

    Attributes:
      label: "collapse" if `relative_std < min_relative_std` (all rows are nearly the same point),
        "partial collapse" if `effective_rank < min_rank_fraction * max_rank`, else "healthy".
      relative_std: `feature_std` over the root mean square of all entries, in [0, 1].
      effective_rank: in [0, max_rank].
      max_rank: largest possible rank of n centred rows of width D, min(n - 1, D).
      min_relative_std: threshold on `relative_std`.
      min_rank_fraction: threshold on `effective_rank / max_rank`.
    """

    label: Literal["healthy", "partial collapse", "collapse"]
    relative_std: float
    effective_rank: float
    max_rank: int
    min_relative_std: float = MIN_RELATIVE_STD
    min_rank_fraction: float = MIN_RANK_FRACTION


def check_features(field: str, features: np.ndarray) -> Float[np.ndarray, "n D"]:
    """Returns `features` unchanged; InputError naming `field` unless a finite, non-empty matrix."""
    if features.ndim != 2 or features.size == 0:
        raise InputError(field, features.shape, "must be a matrix [n, D] with n >= 1 and D >= 1")
    num_bad = int(np.sum(~np.isfinite(features)))
    if num_bad:
        raise InputError(
            field, f"{num_bad} of {features.size} entries NaN or inf", "must be finite"
        )
    return features


def unit_rows(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """Returns the rows scaled to length 1; rows of zeros stay zero."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def feature_std(features: Float[np.ndarray, "_ _"]) -> float:
    """Returns the standard deviation over rows, averaged over dimensions; 0 means collapse."""
    return float(np.std(check_features("features", features), axis=0, dtype=np.float64).mean())


def effective_rank(
    features: Float[np.ndarray, "_ _"], *, spectrum: Float64[np.ndarray, " _"] | None = None
) -> float:
    """Returns the number of directions that the features use: exp of the entropy of the spectrum.

    With singular values sigma_k of the centred features and p_k = sigma_k / sum(sigma), this is
    exp(-sum p_k log p_k): 1 if one direction holds all variation, D if all hold the same.

    Args:
      features: `[n, D]`.
      spectrum: their `singular_values`, if known.

    Returns:
      A value in [1, min(n - 1, D)]; exactly 0.0 if all rows are equal to float32 rounding.

    References:
      Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality"
      (EUSIPCO), definition 1. We centre first: a shared mean must not count as a direction.
    """
    x = check_features("features", features).astype(np.float64)
    centred = x - x.mean(axis=0)
    if np.abs(centred).max() <= _RESOLUTION * np.abs(x).max():
        return 0.0
    sigma = _singular_values(centred) if spectrum is None else spectrum
    p = sigma / sigma.sum()
    return _exp_entropy(p[p > 0])


def rankme(features: Float[np.ndarray, "_ _"], *, epsilon: float = 1e-7) -> float:
    """Returns RankMe: the effective rank of the features without centring.

    Args:
      features: `[n, D]`.
      epsilon: added to each normalised singular value, so that the logarithm exists.

    Returns:
      A value in about [1, min(n, D)]; 0.0 for all-zero features, which have no spectrum.

    References:
      Garrido et al. 2023, "RankMe" (arXiv 2210.02885), equation 1.
    """
    sigma = _singular_values(check_features("features", features).astype(np.float64))
    if sigma.sum() == 0:
        return 0.0
    return _exp_entropy(sigma / sigma.sum() + epsilon)


def singular_values(features: Float[np.ndarray, "_ _"]) -> Float64[np.ndarray, " r"]:
    """Returns the min(n, D) singular values of the centred features, largest first."""
    x = check_features("features", features).astype(np.float64)
    return _singular_values(x - x.mean(axis=0))[::-1]


def alpha_req(
    features: Float[np.ndarray, "_ _"], *, spectrum: Float64[np.ndarray, " _"] | None = None
) -> float:
    """Returns the decay exponent of the spectrum of the covariance: alpha in lambda_j ~ j^-alpha.

    0 is a flat spectrum, good representations are reported near 1, large values mean few
    directions. The slope is a weighted least-squares fit of log lambda_j over log j, for the ranks
    of `ALPHA_RANKS`. The squared error at rank j has weight 1 / j, so that each factor of two in
    rank has the same weight.

    Args:
      features: `[n, D]`.
      spectrum: their `singular_values`, if known.

    Returns:
      alpha; nan if fewer than two eigenvalues remain to fit.

    References:
      Agrawal et al. 2022, "alpha-ReQ" (arXiv 2202.05808), section 2.2. Ranks and weights are those
      of the authors' code, which takes them from Stringer et al. 2019 (Nature 571). One deviation:
      eigenvalues below `ALPHA_FLOOR` of the largest are omitted, because duplicated features or
      bfloat16 rounding produce a noise floor there instead of a power law. Up to commit b92d0cf all
      eigenvalues were fitted without weights, so older numbers cannot be compared.
    """
    sigma = singular_values(features) if spectrum is None else spectrum
    if sigma[0] <= _RESOLUTION * np.abs(features).max():
        return float("nan")
    eigenvalues = sigma**2
    first, last = ALPHA_RANKS
    last = min(last, int(np.sum(eigenvalues > ALPHA_FLOOR * eigenvalues[0])))
    if last - first < 1:
        return float("nan")
    j = np.arange(first, last + 1)
    # polyfit multiplies the errors by `w` before it squares them.
    slope, _ = np.polyfit(np.log(j), np.log(eigenvalues[first - 1 : last]), 1, w=j**-0.5)
    return float(-slope)


def uniformity(
    features: Float[np.ndarray, "_ _"], *, t: float = 2.0, max_rows: int = 4096
) -> float:
    """Returns the uniformity of directions: log of the mean of exp(-t |u - v|^2) over pairs.

    u and v are features scaled to length 1. All pairs of different rows count, among at most
    `max_rows` evenly spaced rows.

    Returns:
      A value in [-4 t, 0]: 0 if all rows have the same direction, about -2 t for uniform directions
      in many dimensions.

    References:
      Wang and Isola 2020 (arXiv 2005.10242), equation 2; t = 2.
    """
    stride = -(-len(check_features("features", features)) // max_rows)
    x = features[::stride].astype(np.float64)
    n = len(x)
    if n < 2:
        raise InputError("features", features.shape, "uniformity needs at least 2 rows")
    unit = unit_rows(x)
    squared = np.maximum(2.0 - 2.0 * unit @ unit.T, 0.0)
    kernel = np.exp(-t * squared)
    return float(np.log((kernel.sum() - np.trace(kernel)) / (n * (n - 1))))


def lidar(
    views: Float[np.ndarray, "_ _ _"], *, delta: float = 1e-4, epsilon: float = 1e-7
) -> float:
    """Returns LiDAR: the number of directions in which images differ more than their views do.

    Sigma_b is the covariance of the mean features of the images, Sigma_w the mean covariance of
    views around them. LiDAR is exp of the entropy of the normalised eigenvalues of
    Sigma_w^(-1/2) Sigma_b Sigma_w^(-1/2): linear discriminant analysis with images as classes.

    Args:
      views: features `[n, q, D]` of q >= 2 augmented views of each of n >= 2 images.
      delta: added to the diagonal of Sigma_w, in squared units of the features. The default, of the
        paper, suits features of about unit size, such as the output of a LayerNorm: a difference
        between images counts if it is well above sqrt(delta) = 0.01.
      epsilon: added to each normalised eigenvalue.

    Returns:
      A value in about [1, min(n - 1, D)]; 0.0 if all images have the same mean features.

    References:
      Thilak et al. 2023, "LiDAR" (arXiv 2312.04000), equations 1 to 3.
    """
    if views.ndim != 3 or min(views.shape[:2]) < 2:
        raise InputError("views", views.shape, "must be [n >= 2, q >= 2, D]")
    n, q, d = views.shape
    x = check_features("views", views.reshape(n * q, d)).astype(np.float64).reshape(n, q, d)
    means = x.mean(axis=1)
    between = means - means.mean(axis=0)
    if np.abs(between).max() <= _RESOLUTION * np.abs(x).max():
        return 0.0
    within = (x - means[:, None]).reshape(n * q, d)
    variance, basis = np.linalg.eigh(within.T @ within / (n * (q - 1)) + delta * np.eye(d))
    # The nonzero eigenvalues of W^(-1/2) B W^(-1/2) are the squared singular values of `whitened`.
    whitened = between @ (basis / np.sqrt(np.maximum(variance, delta)))
    eigenvalues = _singular_values(whitened) ** 2
    return _exp_entropy(eigenvalues / eigenvalues.sum() + epsilon)


def collapse_verdict(
    features: Float[np.ndarray, "_ _"], *, spectrum: Float64[np.ndarray, " _"] | None = None
) -> Verdict:
    """Returns whether the features have collapsed, to a point or to a few directions.

    The thresholds are conventions that detect plain failures. Features above them may still be bad.

    Args:
      features: `[n, D]` with n >= 2, and n well above D: `max_rank` is at most n - 1.
      spectrum: their `singular_values`, if known.
    """
    if len(check_features("features", features)) < 2:
        raise InputError("features", features.shape, "a verdict needs at least 2 rows")
    n, d = features.shape
    max_rank = min(n - 1, d)
    scale = float(np.sqrt(np.mean(np.square(features, dtype=np.float64))))
    relative_std = feature_std(features) / scale if scale > 0 else 0.0
    rank = effective_rank(features, spectrum=spectrum)
    if relative_std < MIN_RELATIVE_STD:
        label = "collapse"
    elif rank < MIN_RANK_FRACTION * max_rank:
        label = "partial collapse"
    else:
        label = "healthy"
    return Verdict(label, relative_std, rank, max_rank)


def _singular_values(x: Float64[np.ndarray, "n D"]) -> Float64[np.ndarray, " r"]:
    """Returns the min(n, D) singular values, ascending, from the smaller Gram matrix.

    This is fast for n = 50,000. Values below about 1e-8 of the largest are inaccurate, but that is
    below the float32 rounding of the input.
    """
    n, d = x.shape
    gram = x.T @ x if d <= n else x @ x.T
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))


def _exp_entropy(p: Float64[np.ndarray, " r"]) -> float:
    """Returns exp of the entropy in nats of positive weights `p`."""
    return float(np.exp(-np.sum(p * np.log(p))))
