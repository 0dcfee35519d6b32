"""Views of an image that agree in a projection, and images that do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.method import losses
from hjepa_jax.method.keys import image_rngs, some_patches, view_rngs
from hjepa_jax.method.objective import Objective
from hjepa_jax.method.optimizer import decay_mask
from hjepa_jax.method.step import LocalViews
from hjepa_jax.models.projection import EPSILON, Projection
from tests.test_options import init_params, jitted, losses_of, make_model, make_step
from tests.test_steps import BATCH, IMAGES, MASK, PATCH, RANDOM

RNG = np.random.default_rng(0)
LOCAL = dataclasses.replace(RANDOM, image_size=3 * PATCH, crop_scale=(0.3, 1.0))
SIZES = (8, 6)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_agreement_is_the_distance_to_the_mean_direction_of_an_image():
    x = RNG.normal(size=(5, 3, 4))
    centre = unit(unit(x).mean(axis=1, keepdims=True))
    expected = 1 - (unit(x) * centre).sum(axis=-1).mean()
    np.testing.assert_allclose(losses.agreement_loss(jnp.asarray(x)), expected, rtol=1e-5)
    # Lengths do not count; two views at a right angle are 45 degrees from their mean.
    same = jnp.asarray(x[:, :1] * np.array([1.0, 2.0, 5.0])[None, :, None])
    np.testing.assert_allclose(losses.agreement_loss(same), 0.0, atol=1e-6)
    apart = jnp.array([[[1.0, 0.0], [0.0, 3.0]]])
    np.testing.assert_allclose(losses.agreement_loss(apart), 1 - np.sqrt(0.5), rtol=1e-5)


def test_spread_is_the_mean_squared_cosine_of_all_pairs_of_a_view():
    x = RNG.normal(size=(7, 2, 4))
    cosines = np.einsum("avk,bvk->vab", unit(x), unit(x))
    expected = 4 * (cosines**2).mean()
    np.testing.assert_allclose(losses.spread_loss(jnp.asarray(x)), expected, rtol=1e-5)
    even = jnp.asarray(np.repeat(np.eye(4), 3, axis=0)[:, None])
    np.testing.assert_allclose(losses.spread_loss(even), 1.0, rtol=1e-5)
    few = jnp.asarray(np.eye(4)[:2, None])  # of two images, two dimensions at most
    np.testing.assert_allclose(losses.spread_loss(few), 2.0, rtol=1e-5)
    alike = jnp.ones((6, 1, 4)) * jnp.arange(1.0, 7.0)[:, None, None]
    np.testing.assert_allclose(losses.spread_loss(alike), 4.0, rtol=1e-5)


def test_both_are_finite_and_have_a_finite_gradient_where_features_vanish():
    for loss in (losses.agreement_loss, losses.spread_loss):
        value, grad = jax.value_and_grad(loss)(jnp.zeros((3, 2, 4)))
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


def test_hidden_features_are_standardized_over_images_and_views_together():
    x = jnp.asarray(RNG.normal(size=(5, 3, 4)), jnp.float32)
    module = Projection(*SIZES)
    variables = jax.device_get(jax.jit(module.init)(jax.random.PRNGKey(0), x))
    params = jax.tree.map(lambda p: p + np.float32(0.1), variables["params"])
    y = np.asarray(x, np.float64)
    for layer in range(2):
        hidden, norm = params[f"hidden_{layer}"], params[f"norm_{layer}"]
        assert set(hidden) == {"kernel"}, "standardizing takes a bias away: noise alone moves it"
        y = y @ np.asarray(hidden["kernel"])
        y = (y - y.mean(axis=(0, 1))) / np.sqrt(y.var(axis=(0, 1)) + EPSILON)
        y = np.maximum(y * np.asarray(norm["scale"]) + np.asarray(norm["bias"]), 0)
    expected = y @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
    found = jax.jit(module.apply)({"params": params}, x)
    assert found.shape == (5, 3, SIZES[1])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_kernels_of_the_projection_alone_are_decayed():
    params = init_params(make_model(projection=Projection(*SIZES)))["projection"]
    decayed = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    assert len(decayed) == 8
    assert all(decays == (path[-1].key == "kernel") for path, decays in decayed)


def test_patches_of_a_view_are_distinct_and_any_is_as_likely_as_any_other():
    rngs = jax.random.split(jax.random.PRNGKey(0), 4_000)
    index = np.asarray(some_patches(rngs, num_patches=9, k=4))
    assert index.shape == (4_000, 4)
    assert all(len(set(row)) == 4 for row in index)
    counts = np.bincount(index.reshape(-1), minlength=9) / 4_000
    assert len(counts) == 9
    assert np.abs(counts - 4 / 9).max() < 4 * np.sqrt(4 / 9 * 5 / 9 / 4_000)


WEIGHTS = {"level_0": 1, "level_1": 0.5, "summary": 1, "agreement": 2.0, "spread": 0.25}


@pytest.mark.parametrize("shown", [None, 4])
def test_the_masked_view_and_the_local_ones_agree(shown):
    model = make_model(projection=Projection(*SIZES))
    views = LocalViews(2, LOCAL, shown)
    step, state = make_step(model, objective=Objective(WEIGHTS), local_views=views)
    terms = losses_of(step, state)

    augment_rngs, mask_rngs = image_rngs(state.rng, state.step, BATCH)
    params = state.params

    def summarize(views, *seen):
        variables = {"params": {"context_encoder": params["context_encoder"]}}
        return jitted(model)(variables, views, *seen, method="encode")[1]

    masks = jax.jit(MASK)(mask_rngs)
    view = jax.jit(RANDOM)(augment_rngs, IMAGES)
    summaries = [summarize(view, masks.context_index, masks.context_valid)]
    for number in (2, 3):
        rngs = view_rngs(augment_rngs, number)
        index = None if shown is None else some_patches(rngs, num_patches=9, k=shown)
        summaries.append(summarize(jax.jit(LOCAL)(rngs, IMAGES), index))
    joined = jnp.stack(summaries, axis=1).reshape(BATCH, 3, -1)
    projected = jax.jit(model.projection.apply)({"params": params["projection"]}, joined)
    for name, loss in (("agreement", losses.agreement_loss), ("spread", losses.spread_loss)):
        np.testing.assert_allclose(terms[f"loss_{name}"], loss(projected), rtol=1e-3)
    total = sum(weight * terms[f"loss_{name}"] for name, weight in WEIGHTS.items())
    np.testing.assert_allclose(terms["loss"], total, rtol=1e-5)
