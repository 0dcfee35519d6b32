"""Each part of a snapshot equals a direct computation with the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.config import build
from hjepa_jax.masks.masks import target_union
from hjepa_jax.models import hierarchy
from hjepa_jax.reporting import image_figures
from hjepa_jax.reporting.snapshot import (
    CONTEXT,
    DROPPED,
    MASK_SEED,
    NUM_IMAGES,
    TARGET,
    VIEW_SEED,
    build_snapshot_fn,
    fixed_images,
)
from hjepa_jax.runtime.backend import initialise
from tests.conftest import make_tiny_config


@pytest.fixture(scope="module")
def seen(shapes_npz):
    """Returns a snapshot of an untrained model with two blocks, and its inputs."""
    tiny_config = make_tiny_config(shapes_npz)
    tiny_config.model.depth = 2
    tiny_config.data.local_views, tiny_config.data.local_size = 2, 8
    tiny_config.data.local_patches = 3
    tiny_config.data.mean, tiny_config.data.std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    model = build.build_model(tiny_config)
    tx = build.build_optimizer(tiny_config, build.build_schedules(tiny_config, 16))
    state = initialise(build.build_create_state(tiny_config, model, tx))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    snapshot = jax.jit(build_snapshot_fn(tiny_config, model))
    found = jax.device_get(snapshot(state.params, state.target_params, images))
    sample = jax.jit(build.build_masks(tiny_config))
    masks = jax.device_get(sample(jax.random.split(jax.random.PRNGKey(MASK_SEED), 3)))
    return tiny_config, model, state, images, masks, found


def test_states_match_the_masks(seen):
    _, _, _, _, masks, found = seen
    hidden = np.asarray(target_union(masks, 16)).reshape(3, 4, 4)
    np.testing.assert_array_equal(found.states[0] == TARGET, hidden)
    for row in range(3):
        context = np.asarray(masks.context_index[row])[np.asarray(masks.context_valid[row])]
        assert set(np.flatnonzero(found.states[0][row].ravel() == CONTEXT)) == set(context)
    whole = hidden.reshape(3, 2, 2, 2, 2).all(axis=(2, 4))
    np.testing.assert_array_equal(found.states[1] == TARGET, whole)
    assert set(np.unique(np.concatenate([s.ravel() for s in found.states]))) <= {
        CONTEXT, TARGET, DROPPED,
    }  # fmt: skip


def test_views_are_those_of_training_in_pixels(seen):
    config, _, _, images, _, found = seen
    rngs = jax.random.split(jax.random.PRNGKey(VIEW_SEED), 3)
    view = build.build_augment(config)(rngs, jnp.asarray(images))
    pixels = np.clip(np.asarray(view) * config.data.std + np.asarray(config.data.mean), 0, 1)
    np.testing.assert_allclose(found.view, pixels, atol=1e-6)
    assert found.local_views.shape == (3, 2, 8, 8, 3)
    assert 0 <= found.local_views.min() < found.local_views.max() <= 1
    assert found.local_seen.sum(axis=(2, 3)).tolist() == [[3, 3]] * 3, (
        "each local view shows 3 of 4 patches"
    )
    rows = [axes.get_ylabel() for axes in image_figures.snapshot_figures(found)["views"].axes]
    assert rows[::3] == ["image", "masked view", "EMA sees", "local view 1", "local view 2"]


def test_cosine_compares_predictions_and_targets(seen):
    config, model, state, images, masks, found = seen
    views = build.build_preprocess(config)(jnp.asarray(images))
    variables = {"params": {"context_encoder": state.target_params}}
    apply = jax.jit(model.apply, static_argnames="method")
    tokens, _ = apply(variables, views, method="encode")
    targets = jax.device_get(hierarchy.level_features(tokens, 4, 2))
    prediction = jax.device_get(apply({"params": state.params}, views, masks))
    for level in range(2):
        tokens = np.reshape(found.tokens[level], targets[level].shape)
        np.testing.assert_allclose(tokens, targets[level], atol=1e-4)
        predicted = ~np.isnan(found.cosine[level])
        np.testing.assert_array_equal(predicted, found.states[level] == TARGET)
    cell = np.argwhere(found.states[1] == TARGET)
    b, r, c = cell[0]
    p, t = prediction.levels[1][b, 2 * r + c], targets[1][b, 2 * r + c]
    expected = float(p @ t / np.linalg.norm(p) / np.linalg.norm(t))
    assert found.cosine[1][b, r, c] == pytest.approx(expected, abs=1e-4)
    b, r, c = np.argwhere(found.states[0] == TARGET)[0]
    slots = np.flatnonzero((np.asarray(masks.target_index[b]).ravel() == 4 * r + c)
                           & np.asarray(masks.target_valid[b]).ravel())  # fmt: skip
    t = np.asarray(targets[0][b, 4 * r + c])
    cosines = [float(p @ t / np.linalg.norm(p) / np.linalg.norm(t))
               for p in np.asarray(prediction.levels[0][b])[slots]]  # fmt: skip
    assert found.cosine[0][b, r, c] == pytest.approx(np.mean(cosines), abs=1e-4)


def test_attention_and_rollout_start_at_summary_tokens(seen):
    config, model, state, images, _, found = seen
    views = build.build_preprocess(config)(jnp.asarray(images))
    variables = {"params": {"context_encoder": state.target_params}}
    encode = functools.partial(model.apply, method="encode", mutable=["intermediates"])
    _, kept = jax.jit(encode)(variables, views)
    blocks = kept["intermediates"]["context_encoder"]
    weights = [np.asarray(blocks[f"block_{i}"]["attention"]["weights"][0]) for i in range(2)]
    np.testing.assert_allclose(weights[0].sum(-1), 1, rtol=1e-5)
    r = config.model.num_summary_tokens
    last = weights[1][:, :, :r, r:].mean(axis=2).reshape(3, 2, 4, 4)
    np.testing.assert_allclose(found.attention, last, atol=1e-5)
    half = [(w.mean(axis=1) + np.eye(16 + r)) / 2 for w in weights]
    rollout = (half[1] @ half[0])[:, :r, r:].mean(axis=1).reshape(3, 4, 4)
    np.testing.assert_allclose(found.rollout, rollout, atol=1e-5)


def test_all_figures_of_a_snapshot_are_drawn(seen):
    figures = image_figures.snapshot_figures(seen[-1])
    assert set(figures) == {"masks", "views", "pca", "cosine", "similarity", "attention"}
    rows = [axes.get_ylabel() for axes in figures["attention"].axes]
    assert {"head 0", "head 1", "rollout", "percent"} <= set(rows)


def test_the_images_of_a_snapshot_are_evenly_spaced():
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    chosen = fixed_images(images).ravel().tolist()
    assert len(chosen) == NUM_IMAGES
    assert chosen == sorted(set(chosen))
    assert chosen[-1] > 50
    assert len(fixed_images(images[:2])) == 2
