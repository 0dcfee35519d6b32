import jax.numpy as jnp
import numpy as np

from hjepa_jax.health import explained_variance

RNG = np.random.default_rng(0)


def test_explained_variance_is_0_for_the_mean_and_1_for_the_target_itself():
    target = jnp.asarray(RNG.normal(loc=3.0, size=(4, 5, 8)), jnp.float32)
    valid = jnp.asarray(RNG.random((4, 5)) < 0.6)
    mean = np.asarray(target)[np.asarray(valid)].mean(axis=0)
    mean = jnp.asarray(mean)[None, None]
    rubbish = jnp.where(valid[..., None], mean, 1e6)  # what nobody asked for does not count
    assert explained_variance(target, target, valid) == 1.0
    np.testing.assert_allclose(explained_variance(rubbish, target, valid), 0.0, atol=1e-5)
    half = mean + (target - mean) / 2
    np.testing.assert_allclose(explained_variance(half, target, valid), 0.75, atol=1e-5)
    assert explained_variance(0.0 * target, target, valid) < -3
    assert explained_variance(target, target, valid & False) == 0.0
    assert explained_variance(target, target * 0 + 1.0, valid) == 0.0  # nothing to explain
