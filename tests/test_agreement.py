"""The projection, the agreement between views of an image, and the spread between images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hjepa_jax.method import losses
from hjepa_jax.method.keys import image_rngs, some_patches, view_rngs
from hjepa_jax.method.objective import SPREAD_MOMENTS, Objective, reported_terms, second_moment
from hjepa_jax.method.optimizer import decay_mask
from hjepa_jax.method.step import LocalViews, Method, sample_inputs
from hjepa_jax.method.train_state import create_train_state
from hjepa_jax.models.projection import EPSILON, Projection
from tests import test_options
from tests.test_options import MASKS, VIEWS, init_params, jitted, losses_of, make_step
from tests.test_steps import BATCH, IMAGES, MASK, PATCH, RANDOM

RNG = np.random.default_rng(0)
LOCAL = dataclasses.replace(RANDOM, image_size=3 * PATCH, crop_scale=(0.3, 1.0))
SIZES = (8, 6)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_model(**kwargs):
    return test_options.make_model({"depth": 1}, projection=Projection(*SIZES), **kwargs)


def test_agreement_is_the_distance_to_the_mean_direction_of_an_image():
    x = RNG.normal(size=(5, 3, 4))
    centre = unit(unit(x).mean(axis=1, keepdims=True))
    expected = 1 - (unit(x) * centre).sum(axis=-1).mean()
    np.testing.assert_allclose(losses.agreement_loss(jnp.asarray(x)), expected, rtol=1e-5)
    # Lengths do not matter. Two views at a right angle are each 45 degrees from their mean.
    same = jnp.asarray(x[:, :1] * np.array([1.0, 2.0, 5.0])[None, :, None])
    np.testing.assert_allclose(losses.agreement_loss(same), 0.0, atol=1e-6)
    apart = jnp.array([[[1.0, 0.0], [0.0, 3.0]]])
    np.testing.assert_allclose(losses.agreement_loss(apart), 1 - np.sqrt(0.5), rtol=1e-5)


def test_spread_is_the_mean_squared_cosine_of_all_pairs_of_a_view():
    x = RNG.normal(size=(7, 2, 4))
    cosines = np.einsum("avk,bvk->vab", unit(x), unit(x))
    expected = 4 * (cosines**2).mean()
    np.testing.assert_allclose(spread(jnp.asarray(x)), expected, rtol=1e-5)
    even = jnp.asarray(np.repeat(np.eye(4), 3, axis=0)[:, None])
    np.testing.assert_allclose(spread(even), 1.0, rtol=1e-5)
    few = jnp.asarray(np.eye(4)[:2, None])  # two images span at most two dimensions
    np.testing.assert_allclose(spread(few), 2.0, rtol=1e-5)
    alike = jnp.ones((6, 1, 4)) * jnp.arange(1.0, 7.0)[:, None, None]
    np.testing.assert_allclose(spread(alike), 4.0, rtol=1e-5)


def spread(x, kind="batch", old=None):
    objective = Objective({"spread": 1.0}, spread_moment=kind)
    return losses.spread_loss(second_moment(objective, x, old))


def assert_value_and_gradient(fn, reference, x):
    """Compares with a NumPy formula in float64 and its gradient by central differences."""
    value, grad = jax.jit(jax.value_and_grad(fn))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(value, reference(x), rtol=1e-5)
    expected, step = np.zeros_like(x), 1e-6
    for at in np.ndindex(*x.shape):
        move = np.zeros_like(x)
        move[at] = step
        expected[at] = (reference(x + move) - reference(x - move)) / (2 * step)
    np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_the_teacher_changes_the_centre_only_by_its_weight(weight):
    x, teacher = RNG.normal(size=(3, 2, 4)), RNG.normal(size=(3, 1, 4))

    def reference(x):
        centre = unit(unit(x).sum(axis=1, keepdims=True) + weight * unit(teacher))
        return 1 - (unit(x) * centre).sum(axis=-1).mean()

    found = lambda x: losses.agreement_loss(x, jnp.asarray(teacher, jnp.float32), weight)
    assert_value_and_gradient(found, reference, x)


def test_the_spread_of_views_compares_the_views_of_all_images_with_each_other():
    def reference(x):
        u = unit(x.reshape(-1, 4))
        return 4 * ((u @ u.T) ** 2).mean()

    assert_value_and_gradient(lambda x: spread(x, "views"), reference, RNG.normal(size=(3, 2, 4)))


def test_a_running_spread_remembers_a_moment_that_has_no_gradient():
    old = RNG.normal(size=(4, 4))

    def reference(x):
        u = unit(x.reshape(-1, 4))
        return 4 * ((0.9 * old + 0.1 * u.T @ u / len(u)) ** 2).sum()

    running = lambda x: spread(x, "running", jnp.asarray(old, jnp.float32))
    assert_value_and_gradient(running, reference, RNG.normal(size=(3, 2, 4)))
    to_old = jax.jit(jax.grad(lambda old: spread(jnp.ones((3, 2, 4)), "running", old)))(jnp.eye(4))
    assert not np.any(to_old)


@pytest.mark.parametrize("kind", SPREAD_MOMENTS)
def test_the_logged_spread_of_independent_images_is_1(kind):
    objective = Objective({"spread": 1.0}, spread_moment=kind)

    @jax.jit
    def logged(image, moment):
        views = jnp.repeat(image, 3, axis=1)  # three equal views
        moments = second_moment(objective, views, moment)
        terms = {"spread": losses.spread_loss(moments)}
        return moments[0], reported_terms(objective, terms, views)["spread"]

    moment, found, rng = jnp.eye(32) / 32, [], np.random.default_rng(5)
    for _ in range(200):
        moment, value = logged(jnp.asarray(rng.normal(size=(16, 1, 32)), jnp.float32), moment)
        found.append(float(value))
    assert np.mean(found[100:]) == pytest.approx(1.0, abs=0.03)


def test_agreement_and_spread_of_zero_features_are_finite():
    for loss in (losses.agreement_loss, spread):
        value, grad = jax.jit(jax.value_and_grad(loss))(jnp.zeros((3, 2, 4)))
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
        assert set(hidden) == {"kernel"}, (
            "standardizing would remove a bias: only rounding noise would train it"
        )
        y = y @ np.asarray(hidden["kernel"])
        y = (y - y.mean(axis=(0, 1))) / np.sqrt(y.var(axis=(0, 1)) + EPSILON)
        y = np.maximum(y * np.asarray(norm["scale"]) + np.asarray(norm["bias"]), 0)
    expected = y @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
    found = jax.jit(module.apply)({"params": params}, x)
    assert found.shape == (5, 3, SIZES[1])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_kernels_of_the_projection_alone_are_decayed():
    views = jnp.zeros((2, 1, 4))
    params = jax.eval_shape(Projection(*SIZES).init, jax.random.PRNGKey(0), views)["params"]
    decayed = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    assert len(decayed) == 8
    assert all(decays == (path[-1].key == "kernel") for path, decays in decayed)


def test_patches_of_a_view_are_distinct_and_equally_likely():
    rngs = jax.random.split(jax.random.PRNGKey(0), 4_000)
    index = np.asarray(some_patches(rngs, num_patches=9, k=4))
    assert index.shape == (4_000, 4)
    assert all(len(set(row)) == 4 for row in index)
    counts = np.bincount(index.reshape(-1), minlength=9) / 4_000
    assert len(counts) == 9
    assert np.abs(counts - 4 / 9).max() < 4 * np.sqrt(4 / 9 * 5 / 9 / 4_000)


WEIGHTS = {"level_0": 1.0, "level_1": 0.5, "summary": 1.0, "agreement": 2.0, "spread": 0.25}


@pytest.mark.parametrize(
    ("shown", "reads", "teacher_weight"),
    [
        pytest.param(None, "summary", 0.0, marks=pytest.mark.slow),
        (4, "summary+patches", 1.5),
    ],
)
def test_agreement_and_spread_of_a_step_match_direct_values(shown, reads, teacher_weight):
    model = make_model(projection_input=reads)
    objective = Objective(WEIGHTS, teacher_weight=teacher_weight)
    step, state = make_step(model, objective=objective, local_views=LocalViews(2, LOCAL, shown))
    state = dataclasses.replace(
        state, target_params=jax.tree.map(lambda x: 0.9 * x, state.target_params)
    )
    found = losses_of(step, state)

    @jax.jit
    def expected(params, target_params):
        augment_rngs, mask_rngs = image_rngs(state.rng, state.step, BATCH)
        masks, view = MASK(mask_rngs), RANDOM(augment_rngs, IMAGES)

        def features(encoder_params, views, index=None, valid=None):
            variables = {"params": {"context_encoder": encoder_params}}
            tokens, summary = model.apply(variables, views, index, valid, method="encode")
            valid = jnp.ones(tokens.shape[:2]) if valid is None else valid
            mean = jnp.sum(tokens * valid[..., None], axis=1) / valid.sum(axis=1)[:, None]
            parts = {"summary": summary.reshape(BATCH, -1), "patches": mean}
            return jnp.concatenate([parts[name] for name in reads.split("+")], axis=1)

        encoder = params["context_encoder"]
        views = [features(encoder, view, masks.context_index, masks.context_valid)]
        for number in (2, 3):
            rngs = view_rngs(augment_rngs, number)
            index = None if shown is None else some_patches(rngs, num_patches=9, k=shown)
            views.append(features(encoder, LOCAL(rngs, IMAGES), index))
        project = lambda x: model.projection.apply({"params": params["projection"]}, x)
        projected = project(jnp.stack(views, axis=1))
        teacher = project(features(target_params, view)[:, None]) if teacher_weight else None
        return losses.agreement_loss(projected, teacher, teacher_weight), spread(projected)

    agreement, evenness = expected(state.params, state.target_params)
    np.testing.assert_allclose(found["loss_agreement"], agreement, rtol=1e-3)
    floor = losses.spread_floor(SIZES[1], BATCH)
    np.testing.assert_allclose(found["loss_spread"] * floor, evenness, rtol=1e-3)
    total = sum(weight * found[f"loss_{name}"] for name, weight in WEIGHTS.items())
    total += WEIGHTS["spread"] * (floor - 1) * found["loss_spread"]
    np.testing.assert_allclose(found["loss"], total, rtol=1e-5)


def test_no_gradient_flows_through_the_teacher():
    model = make_model(levels=())
    params = init_params(model)
    targets = jitted(model)({"params": params}, VIEWS, method="targets")

    def teacher(params):
        out = model.apply({"params": params}, VIEWS, MASKS, None, None, targets)
        return jnp.sum(out.projected_target**2)

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(teacher))(params)))


@pytest.mark.slow
def test_the_state_carries_the_running_moment_from_part_to_part():
    model = make_model(levels=())
    objective = Objective({"agreement": 1.0, "spread": 0.5}, spread_moment="running")
    views = LocalViews(1, LOCAL)
    step, state = make_step(model, objective=objective, local_views=views, num_parts=2)
    state = create_train_state(state.params, optax.sgd(0.1), state.rng, moment_width=SIZES[1])
    new, outputs = step(state, IMAGES)
    method = Method(model, optax.sgd(0.1), MASK, RANDOM, objective, None, views)
    expected = np.eye(SIZES[1]) / SIZES[1]
    keys = image_rngs(state.rng, state.step, BATCH)

    @jax.jit
    def projections(params, *part):
        inputs = sample_inputs(method, *part)
        seen = (inputs.view, inputs.masks, inputs.local_views)
        return model.apply({"params": params}, *seen).projected

    for part in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
        projected = projections(state.params, IMAGES[part], *(rngs[part] for rngs in keys))
        u = unit(np.asarray(projected).reshape(-1, SIZES[1]))
        expected = 0.9 * expected + 0.1 * u.T @ u / len(u)
    np.testing.assert_allclose(new.spread_moment, expected, atol=1e-5)
    assert outputs.finite
    assert outputs.spread_moment is None
