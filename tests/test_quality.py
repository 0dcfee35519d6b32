import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation import quality


def features(n=400, d=16, rank=None, seed=0):
    """Returns Gaussian features, isotropic unless `rank` < d confines them to a subspace."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, rank or d))
    if rank:
        x = x @ np.linalg.qr(rng.normal(size=(d, rank)))[0].T
    return x.astype(np.float32)


def entropy_rank(p):
    return np.exp(sum(-v * np.log(v) for v in p if v > 0))


# Centred and uncentred alike: the columns are orthogonal, of mean 0 and length 6 and 2, so
# p = (3/4, 1/4) and the rank is exp(3/4 log 4/3 + 1/4 log 4) = 4 / 3^(3/4).
BY_HAND = np.array([[3, 1], [-3, 1], [3, -1], [-3, -1]], np.float32)


def test_ranks_and_std_match_a_case_worked_by_hand():
    assert quality.effective_rank(BY_HAND) == pytest.approx(4 / 3**0.75, rel=1e-7)
    assert quality.rankme(BY_HAND) == pytest.approx(4 / 3**0.75, rel=1e-5)
    assert quality.feature_std(BY_HAND) == pytest.approx(2.0)


@pytest.mark.parametrize(("n", "d"), [(100, 12), (12, 100)])
def test_ranks_match_an_independent_svd(n, d):
    x = features(n, d).astype(np.float64) * np.geomspace(1, 1e-3, d) + 2.0
    sigma = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    assert quality.effective_rank(x) == pytest.approx(entropy_rank(sigma / sigma.sum()), rel=1e-5)
    sigma = np.linalg.svd(x, compute_uv=False)
    assert quality.rankme(x) == pytest.approx(entropy_rank(sigma / sigma.sum() + 1e-7), rel=1e-5)


def test_rank_of_low_rank_features_is_at_most_their_rank():
    rank = quality.effective_rank(features(d=64, rank=3))
    assert 2.9 < rank <= 3 + 1e-4


def test_effective_rank_ignores_a_shared_mean_and_rankme_does_not():
    x = features()
    shifted = x + 100
    assert quality.effective_rank(shifted) == pytest.approx(quality.effective_rank(x), rel=1e-4)
    assert quality.rankme(shifted) < quality.rankme(x) / 2


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_constant_features_have_effective_rank_zero(value):
    x = np.full((50, 8), value, np.float32)
    assert quality.effective_rank(x) == 0.0
    assert quality.feature_std(x) == pytest.approx(0.0, abs=1e-9)
    assert quality.rankme(x) == pytest.approx(float(value > 0), abs=1e-4)


def test_constant_encoder_is_a_collapse():
    row = features(n=1)
    nearly = np.repeat(row, 100, axis=0) + 1e-4 * features(n=100)
    assert quality.collapse_verdict(np.repeat(row, 100, axis=0)).label == "collapse"
    assert quality.collapse_verdict(nearly).label == "collapse"


def test_low_rank_features_are_a_partial_collapse():
    assert quality.collapse_verdict(features(d=64, rank=3)).label == "partial collapse"


def test_isotropic_gaussian_features_are_healthy():
    verdict = quality.collapse_verdict(features())
    assert verdict.label == "healthy"
    assert verdict.max_rank == 16
    assert verdict.effective_rank > 15
    assert verdict.relative_std == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    "function", ["effective_rank", "rankme", "feature_std", "collapse_verdict"]
)
@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.array([[np.nan]]), np.array([[np.inf, 0.0]])])
def test_unusable_features_are_refused_by_name(function, bad):
    with pytest.raises(InputError, match=r"^features="):
        getattr(quality, function)(bad)


def test_a_single_row_gets_no_verdict():
    with pytest.raises(InputError, match="at least 2 rows"):
        quality.collapse_verdict(features(n=1))
