import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.method import losses

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def distances(x, y, kind):
    return losses.elementwise_loss(jnp.asarray(x), jnp.asarray(y), kind)


COSINES = [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]], [[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]
BY_HAND = {
    # The errors are 0.5 and 3: the mean of 0.5 * 0.5^2 and 3 - 0.5.
    "smooth_l1": (lambda: distances([[0.5, 3.0]], [[0.0, 0.0]], "smooth_l1"), [1.3125]),
    "mse": (lambda: distances([[1.0, 3.0]], [[0.0, 0.0]], "mse"), [5.0]),
    "cosine": (lambda: distances(*COSINES, "cosine"), [0.0, 1 - 2**-0.5, 2.0]),
    # Two images, one feature with values 0 and 1: the variance is 1/2.
    "variance": (
        lambda: losses.variance_loss(jnp.array([[[0.0]], [[1.0]]])),
        1 - np.sqrt(0.5 + 1e-4),
    ),
    # Two equal features of variance 2: both off-diagonal entries are 2, so 2 * 2^2 / D = 4.
    "covariance": (
        lambda: losses.covariance_loss(jnp.array([[[-1.0, -1.0]], [[1.0, 1.0]]])),
        4.0,
    ),
    # Three images at 0: 3 * integral of (1 - exp(-t^2/2))^2 exp(-t^2/2). The integrand is a sum
    # of three Gaussians.
    "sigreg": (
        lambda: losses.sigreg_loss(jnp.zeros((3, 1, 4)), jnp.eye(4)[:, :1]),
        3 * np.sqrt(2 * np.pi) * (1 - 2 / np.sqrt(2) + 1 / np.sqrt(3)),
    ),
}


@pytest.mark.parametrize("term", BY_HAND)
def test_every_term_has_its_value_by_hand(term):
    find, expected = BY_HAND[term]
    np.testing.assert_allclose(jax.jit(find)(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", losses.PREDICTION_LOSSES)
def test_prediction_loss_is_the_mean_over_valid_queries(kind):
    """Predictions at invalid queries change neither the loss nor its gradient."""
    prediction, target, valid = normal(3, 5, 8), 2 * normal(3, 5, 8), RNG.random((3, 5)) < 0.6
    p, t = prediction[valid].astype(np.float64), target[valid].astype(np.float64)
    if kind == "smooth_l1":
        e = np.abs(p - t)
        expected = np.where(e < 1, 0.5 * e**2, e - 0.5).mean()
    elif kind == "mse":
        expected = ((p - t) ** 2).mean()
    else:
        norms = np.linalg.norm(p, axis=1) * np.linalg.norm(t, axis=1)
        expected = (1 - (p * t).sum(1) / norms).mean()
    fn = jax.jit(jax.value_and_grad(lambda p: losses.prediction_loss(p, target, valid, kind)))
    other = np.where(valid[..., None], prediction, 1e3 * normal(3, 5, 8))
    target, valid = jnp.asarray(target), jnp.asarray(valid)
    (loss, grad), (other_loss, other_grad) = fn(jnp.asarray(prediction)), fn(jnp.asarray(other))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert loss == other_loss
    np.testing.assert_array_equal(grad, other_grad)
    assert not np.any(grad[~valid])
    assert np.all(np.any(grad[valid], axis=-1))


def test_no_valid_query_gives_zero_and_not_nan():
    x = jnp.ones((1, 2, 3))
    assert losses.prediction_loss(x, 2 * x, jnp.zeros((1, 2), bool)) == 0


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="huber"):
        distances(np.ones((1, 2)), np.ones((1, 2)), "huber")


def test_variance_loss_against_numpy():
    x = 0.5 * normal(32, 2, 6)
    std = np.sqrt(x.astype(np.float64).var(axis=0, ddof=1) + 1e-4)
    expected = np.maximum(1 - std, 0).mean()
    np.testing.assert_allclose(losses.variance_loss(jnp.asarray(x)), expected, rtol=1e-5)
    assert losses.variance_loss(jnp.asarray((x - x.mean(0)) / x.std(0, ddof=1))) == 0
    # A constant difference between tokens does not count as variance.
    x = np.broadcast_to(np.array([0.0, 100.0], np.float32)[None, :, None], (16, 2, 4))
    np.testing.assert_allclose(losses.variance_loss(jnp.asarray(x)), 1 - 1e-2, rtol=1e-5)


def test_covariance_loss_against_numpy():
    x = normal(40, 3, 5)
    expected = 0.0
    for r in range(3):
        c = np.cov(x[:, r].astype(np.float64), rowvar=False)
        expected += (c**2).sum() - (np.diag(c) ** 2).sum()
    expected /= 3 * 5
    np.testing.assert_allclose(losses.covariance_loss(jnp.asarray(x)), expected, rtol=1e-4)
    large = (1000 * x).astype(jnp.float16)
    assert np.isfinite(losses.covariance_loss(jnp.asarray(large))), (
        "the loss must not overflow in float16"
    )


sigreg_and_gradient = jax.jit(jax.value_and_grad(losses.sigreg_loss))


def epps_pulley(y: np.ndarray) -> float:
    """The statistic of one projection, from the closed form of its integral."""
    y = y.astype(np.float64)
    pairs = np.exp(-0.5 * (y[:, None] - y[None]) ** 2).mean()
    singles = np.exp(-0.25 * y**2).mean()
    return len(y) * np.sqrt(2 * np.pi) * (pairs - np.sqrt(2) * singles + 1 / np.sqrt(3))


def test_sigreg_is_the_mean_over_tokens_and_directions():
    x = 0.7 * normal(24, 2, 6) + 0.3
    directions = losses.random_directions(jax.random.PRNGKey(0), 5, 6)
    y = x @ np.asarray(directions)
    expected = np.mean([epps_pulley(y[:, r, a]) for r in range(2) for a in range(5)])
    found, _ = sigreg_and_gradient(jnp.asarray(x), directions)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("spread", "tolerance"), [(0.1, 1e-4), (1.0, 1e-4), (2.0, 1e-3), (3.0, 1e-2), (4.0, 0.05)]
)
def test_sigreg_and_its_gradient_match_the_integral(spread, tolerance):
    """Compares with the closed form. At a spread of 3, the gradient was once 26 % off."""
    y = spread * np.random.default_rng(0).normal(size=128)
    x = jnp.asarray(y.reshape(-1, 1, 1), jnp.float32)
    value, gradient = sigreg_and_gradient(x, jnp.ones((1, 1)))
    assert value == pytest.approx(epps_pulley(y), rel=tolerance)
    apart = y[:, None] - y[None]
    pairs = -2 / len(y) * (apart * np.exp(-(apart**2) / 2)).sum(axis=1)
    expected = np.sqrt(2 * np.pi) * (pairs + y / np.sqrt(2) * np.exp(-(y**2) / 4))
    error = np.linalg.norm(gradient[:, 0, 0] - expected)
    assert error < tolerance * np.linalg.norm(expected)
    # Check the closed form itself: compare it with a sum over 8,001 points in float64.
    t = np.linspace(-12, 12, 8001)
    gap = np.abs(np.exp(1j * np.outer(t, y)).mean(axis=1) - np.exp(-(t**2) / 2)) ** 2
    dense = len(y) * np.sum(gap * np.exp(-(t**2) / 2)) * (t[1] - t[0])
    assert epps_pulley(y) == pytest.approx(dense, rel=1e-6)


def test_directions_are_uniform_on_the_sphere_and_drawn_anew():
    one, other = (losses.random_directions(jax.random.PRNGKey(i), 8192, 3) for i in (2, 3))
    np.testing.assert_allclose(jnp.mean(one, axis=1), 0, atol=0.03)  # 4.7 sigma
    np.testing.assert_allclose(one @ one.T / 8192, np.eye(3) / 3, atol=0.02)
    cosines = np.abs(np.sum(np.asarray(one) * np.asarray(other), axis=0))
    assert cosines.max() > 0.99, "some directions of both draws must be nearly parallel"
    assert cosines.mean() < 0.6


def test_sigreg_is_ten_times_lower_for_normal_features():
    directions = losses.random_directions(jax.random.PRNGKey(1), 64, 16)
    np.testing.assert_allclose(jnp.sum(directions**2, axis=0), 1, rtol=1e-5)
    spread, grad = sigreg_and_gradient(jnp.asarray(normal(128, 1, 16)), directions)
    constant = jnp.broadcast_to(jnp.asarray(normal(1, 1, 16)), (128, 1, 16))
    assert 0 < spread < 0.1 * sigreg_and_gradient(constant, directions)[0]
    assert spread < 2  # the expected value is 1.06
    assert np.isfinite(grad).all()
    assert np.any(grad)
