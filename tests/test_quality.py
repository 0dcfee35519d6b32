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


def test_ranks_and_std_match_a_case_worked_by_hand():
    """The columns have mean 0, are orthogonal and have lengths 6 and 2.

    So p = (3/4, 1/4), and the rank is exp(entropy(p)) = 4 / 3^(3/4).
    """
    x = np.array([[3, 1], [-3, 1], [3, -1], [-3, -1]], np.float32)
    assert quality.effective_rank(x) == pytest.approx(4 / 3**0.75, rel=1e-7)
    assert quality.rankme(x) == pytest.approx(4 / 3**0.75, rel=1e-5)
    assert quality.feature_std(x) == pytest.approx(2.0)


@pytest.mark.parametrize(("n", "d"), [(100, 12), (12, 100)])
def test_ranks_match_an_independent_svd(n, d):
    x = features(n, d).astype(np.float64) * np.geomspace(1, 1e-3, d) + 2.0
    sigma = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    assert quality.effective_rank(x) == pytest.approx(entropy_rank(sigma / sigma.sum()), rel=1e-5)
    sigma = np.linalg.svd(x, compute_uv=False)
    assert quality.rankme(x) == pytest.approx(entropy_rank(sigma / sigma.sum() + 1e-7), rel=1e-5)
    centred = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(quality.singular_values(x), centred, rtol=1e-4, atol=1e-6)


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


def centred_basis(n, d, seed=0):
    """Returns d orthonormal columns of mean 0."""
    basis = np.random.default_rng(seed).normal(size=(n, d))
    return np.linalg.svd(basis - basis.mean(axis=0), full_matrices=False)[0]


@pytest.mark.parametrize("alpha", [0.0, 0.8, 2.0])
def test_alpha_req_recovers_the_exponent_of_a_power_law(alpha):
    x = centred_basis(512, 32) * np.arange(1, 33) ** (-alpha / 2)
    assert quality.alpha_req(x) == pytest.approx(alpha, abs=1e-3)


def test_alpha_req_by_hand():
    """The eigenvalues 1, 1/2, 1/4 at ranks 4, 5, 6 have the weights 1/4, 1/5, 1/6.

    In sixtieths the weights are 15, 12, 10. The weighted mean of log 4, log 5, log 6 is 1.568251.
    The weighted mean of 0, -log 2, -2 log 2 is -0.599479. The weighted products about these means
    sum to -3.441082, and the squares sum to 1.016540. The slope is their ratio, -3.385092.
    """
    x = centred_basis(64, 6) * np.sqrt([90, 40, 7, 1, 0.5, 0.25])  # the first three are ignored
    assert quality.alpha_req(x) == pytest.approx(3.385092, rel=1e-5)


@pytest.mark.parametrize("width", [16, 64, 128])
def test_duplicated_features_change_no_metric(width):
    """The copies differ by noise of 1e-4, which must not count as further directions."""
    rng = np.random.default_rng(0)
    x = np.sqrt(3000) * centred_basis(3000, width) * np.arange(1, width + 1) ** -0.5
    twice = (np.hstack([x, x]) + 1e-4 * rng.normal(size=(3000, 2 * width))).astype(np.float32)
    assert quality.alpha_req(twice) == pytest.approx(1.0, abs=1e-2)
    for metric in (quality.effective_rank, quality.rankme):
        assert metric(twice) == pytest.approx(metric(x), rel=0.01)
    image, noise = twice[:200, None], 0.1 * rng.normal(size=(200, 3, width))
    views = image[..., :width] + noise
    again = np.concatenate([views, views], axis=-1)
    again += 1e-4 * rng.normal(size=again.shape)
    assert quality.lidar(again) == pytest.approx(quality.lidar(views), rel=0.02)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_metrics_do_not_depend_on_the_unit_of_features(scale):
    x = features() * np.arange(1, 17) ** -0.5
    for metric in (quality.alpha_req, quality.effective_rank, quality.rankme, quality.uniformity):
        assert metric(scale * x) == pytest.approx(metric(x), rel=1e-5)


def test_alpha_req_without_a_spectrum_is_nan():
    assert np.isnan(quality.alpha_req(np.ones((20, 4), np.float32)))
    assert np.isnan(quality.alpha_req(features(d=8, rank=1)))
    assert np.isnan(quality.alpha_req(features(d=4)))  # a single eigenvalue at rank 4 has no slope
    assert np.isfinite(quality.alpha_req(features(d=5)))


def test_uniformity_matches_a_loop_over_pairs():
    x = features(n=30, d=5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [
        np.exp(-2 * np.sum((unit[i] - unit[j]) ** 2))
        for i in range(30) for j in range(30) if i != j
    ]  # fmt: skip
    assert quality.uniformity(x) == pytest.approx(np.log(np.mean(pairs)), rel=1e-5)
    assert quality.uniformity(np.ones((9, 3), np.float32)) == pytest.approx(0.0, abs=1e-9)
    # Two opposite points have squared distance 4, so the result is log exp(-8).
    assert quality.uniformity(np.array([[1.0], [-1.0]])) == pytest.approx(-8.0)


def test_lidar_matches_an_independent_discriminant_analysis():
    rng = np.random.default_rng(1)
    views = rng.normal(size=(40, 1, 6)) * np.arange(1, 7) + 0.5 * rng.normal(size=(40, 8, 6))
    within = np.mean([np.cov(image, rowvar=False) for image in views], axis=0) + 0.3 * np.eye(6)
    between = np.cov(views.mean(axis=1), rowvar=False)
    eigenvalues = np.linalg.eigvals(np.linalg.solve(within, between)).real
    p = eigenvalues / eigenvalues.sum() + 1e-7
    assert quality.lidar(views, delta=0.3) == pytest.approx(entropy_rank(p), rel=1e-5)


def test_lidar_counts_directions_of_images_not_of_views():
    rng = np.random.default_rng(2)
    image = np.zeros((60, 1, 16))
    image[:, :, :3] = rng.normal(size=(60, 1, 3))
    views = image + 1e-2 * rng.normal(size=(60, 10, 16))
    assert 2.5 < quality.lidar(views) < 3.5
    assert quality.lidar(np.ones((6, 4, 8))) == 0.0


ROW = features(n=1)


@pytest.mark.parametrize(
    ("x", "label"),
    [
        (np.repeat(ROW, 100, axis=0), "collapse"),
        (np.repeat(ROW, 100, axis=0) + 1e-4 * features(n=100), "collapse"),
        (features(d=64, rank=3), "partial collapse"),
        (features(), "healthy"),
    ],
)
def test_a_verdict_tells_constant_narrow_and_isotropic_features_apart(x, label):
    verdict = quality.collapse_verdict(x)
    assert (verdict.label, verdict.max_rank) == (label, x.shape[1])
    if label == "partial collapse":
        assert 2.9 < verdict.effective_rank <= 3 + 1e-4
    if label == "healthy":
        assert verdict.effective_rank > 15
        assert verdict.relative_std == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    "function",
    ["effective_rank", "rankme", "feature_std", "collapse_verdict", "alpha_req", "uniformity"],
)
@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.array([[np.nan]]), np.array([[np.inf, 0.0]])])
def test_unusable_features_are_refused_by_name(function, bad):
    with pytest.raises(InputError, match=r"^features="):
        getattr(quality, function)(bad)


def test_a_single_row_gets_no_verdict():
    with pytest.raises(InputError, match="at least 2 rows"):
        quality.collapse_verdict(features(n=1))
