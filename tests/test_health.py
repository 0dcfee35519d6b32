import jax.numpy as jnp
import numpy as np

from hjepa_jax.method.health import explained_variance, image_share, position_share

RNG = np.random.default_rng(0)


def test_explained_variance_is_0_for_the_mean_and_1_for_the_target_itself():
    target = jnp.asarray(RNG.normal(loc=3.0, size=(4, 5, 8)), jnp.float32)
    valid = jnp.asarray(RNG.random((4, 5)) < 0.6)
    mean = np.asarray(target)[np.asarray(valid)].mean(axis=0)
    mean = jnp.asarray(mean)[None, None]
    rubbish = jnp.where(valid[..., None], mean, 1e6)  # values at invalid queries do not count
    assert explained_variance(target, target, valid) == 1.0
    np.testing.assert_allclose(explained_variance(rubbish, target, valid), 0.0, atol=1e-5)
    half = mean + (target - mean) / 2
    np.testing.assert_allclose(explained_variance(half, target, valid), 0.75, atol=1e-5)
    assert explained_variance(0.0 * target, target, valid) < -3
    assert explained_variance(target, target, valid & False) == 0.0
    assert explained_variance(target, target * 0 + 1.0, valid) == 0.0  # a constant target


def test_position_share_is_not_inflated_by_few_images():
    """Variance 4 between positions, and 1 between images at each position, at any scale."""
    places, images = RNG.normal(size=(1, 49, 64)), RNG.normal(size=(8, 49, 64))
    mixed = jnp.asarray(0.1 * (2 * places + images) + 3.0, jnp.float32)
    np.testing.assert_allclose(position_share(mixed), 0.8, atol=0.01)
    alone = jnp.asarray(images, jnp.float32)
    assert position_share(alone) < 0.01  # the uncorrected means of 8 images give 1/8
    # The mean of an image adds variance that the position does not explain.
    np.testing.assert_allclose(
        position_share(mixed + jnp.asarray(RNG.normal(size=(8, 1, 64)), jnp.float32)),
        0.04 / (0.04 + 0.01 + 1.0),
        atol=0.01,
    )
    assert position_share(jnp.ones((4, 9, 2))) == 0.0


def test_image_share_is_not_inflated_by_few_patches():
    """Variance 4 between images, 1 between positions, and 1 that depends on both."""
    of_image, of_place = RNG.normal(size=(64, 1, 48)), RNG.normal(size=(1, 9, 48))
    rest = RNG.normal(size=(64, 9, 48))
    mixed = jnp.asarray(0.1 * (2 * of_image + of_place + rest) + 3.0, jnp.float32)
    np.testing.assert_allclose(image_share(mixed), 4 / 6, atol=0.02)
    np.testing.assert_allclose(position_share(mixed), 1 / 6, atol=0.02)
    assert image_share(jnp.asarray(rest, jnp.float32)) < 0.01  # the uncorrected means give 1/9
    assert image_share(jnp.ones((4, 9, 2))) == 0.0
