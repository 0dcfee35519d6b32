"""The training step: order of updates, gradients, accumulation and PRNG keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hjepa_jax.data.augment import Augment
from hjepa_jax.masks.masks import gather_tokens
from hjepa_jax.masks.samplers import MultiBlockMask
from hjepa_jax.method import losses
from hjepa_jax.method.embed import make_embed_fn
from hjepa_jax.method.keys import batch_rng, image_rngs, view_rngs
from hjepa_jax.method.objective import Objective, loss_terms, weighted_sum
from hjepa_jax.method.optimizer import make_optimizer
from hjepa_jax.method.step import Method, StepOutputs, gradient, make_train_step
from hjepa_jax.method.train_state import TrainState, create_train_state, ema_update
from hjepa_jax.method.window import (
    empty_window,
    make_averages,
    make_run_steps,
    nonfinite_terms,
    reset_averages,
    update_window,
)
from hjepa_jax.models import hierarchy
from hjepa_jax.models.hjepa import HJEPA, Prediction
from hjepa_jax.models.predictor import Predictor
from hjepa_jax.models.vit import VisionTransformer
from hjepa_jax.training.alarms import spread, summarize

GRID, PATCH, WIDTH, BATCH = 4, 4, 16, 8
SIZE = GRID * PATCH


class Spoiled(Augment):
    """Makes all pixels of an image NaN if its first value is 255."""

    def __call__(self, rngs, images):
        return jnp.where(images[:, :1, :1, :1] == 255, jnp.nan, super().__call__(rngs, images))


OBJECTIVE = Objective(
    {"level_0": 1.0, "level_1": 0.5, "summary": 0.7, "variance": 1.0, "covariance": 0.1}
)
PLAIN = Augment(SIZE, (0.5,) * 3, (0.25,) * 3)
SPOILED = Spoiled(SIZE, (0.5,) * 3, (0.25,) * 3)  # the same, except for images that start with 255
RANDOM = Augment(
    SIZE, (0.5,) * 3, (0.25,) * 3, crop_scale=(0.5, 1.0), horizontal_flip=0.5, brightness=0.2
)
MASK = MultiBlockMask(GRID, 2, (0.25, 0.25), (1.0, 1.0), align_level=1, context_scale=(1.0, 1.0))
MODEL = HJEPA(
    VisionTransformer(GRID, PATCH, WIDTH, depth=1, num_heads=2, num_summary_tokens=2),
    Predictor(GRID, 2, WIDTH, width=8, depth=1, num_heads=2),
)
apply = jax.jit(MODEL.apply, static_argnames="method")
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8))
IMAGES = IMAGES.at[:, 0, 0, 0].set(0)  # no image is spoiled


@functools.cache
def init_params():
    rng = jax.random.PRNGKey(0)
    masks = MASK(jax.random.split(rng, 1))
    return jax.jit(MODEL.init)(rng, jnp.zeros((1, SIZE, SIZE, 3)), masks)["params"]


@functools.cache
def make_state(tx: optax.GradientTransformation) -> TrainState:
    return jax.jit(lambda p: create_train_state(p, tx, jax.random.PRNGKey(1)))(init_params())


# The EMA momentum is 1 after step KEEPS and 0 after step COPIES. The momentum depends on the step,
# so that tests of both values share one compiled program.
KEEPS, COPIES = 100, 200


def ema_momentum(step):
    return jnp.select([step <= KEEPS, step <= COPIES], [jnp.float32(0.98), jnp.float32(1.0)], 0.0)


def make_method(tx, parts=1):
    return Method(
        model=MODEL,
        tx=tx,
        sample_masks=MASK,
        augment=SPOILED,
        objective=OBJECTIVE,
        ema_momentum_fn=ema_momentum,
        num_parts=parts,
    )


@functools.cache
def make_step(tx, parts=1):
    """Returns the jitted step; it is compiled once for all tests with the same arguments."""
    return jax.jit(make_train_step(make_method(tx, parts)))


ADAMW = make_optimizer(
    learning_rate_fn=lambda s: jnp.float32(3e-3),
    weight_decay_fn=lambda s: jnp.float32(0.05),
    clip_norm=3.0,
)
SGD = optax.sgd(0.1)


def test_the_loss_is_the_weighted_sum_of_terms_at_the_parameters_before_the_update():
    """The summary term predicts the same levels from the summary tokens alone."""
    state = make_state(ADAMW)
    _, mask_rngs = image_rngs(state.rng, state.step, BATCH)
    masks, views = jax.jit(MASK)(mask_rngs), jax.jit(PLAIN)(mask_rngs, IMAGES)
    encoder = {"params": {"context_encoder": state.target_params}}
    tokens, _ = apply(encoder, views, method="encode")
    finest, coarse = hierarchy.level_features(tokens, GRID, 2)
    targets = {0: gather_tokens(finest, masks.target_index.reshape(BATCH, -1)), 1: coarse}
    prediction = apply({"params": state.params}, views, masks)
    terms = loss_terms(OBJECTIVE, prediction, targets, batch_rng(state.rng, state.step))
    assert list(terms) == list(OBJECTIVE.weights)
    by_hand = [
        losses.prediction_loss(prediction.summary_levels[n], targets[n], prediction.query_valid[n])
        for n in (0, 1)
    ]
    np.testing.assert_allclose(terms["summary"], by_hand[0] + 0.5 * by_hand[1], rtol=1e-6)
    _, outputs = make_step(ADAMW)(state, IMAGES)
    expected = terms["level_0"] + 0.5 * terms["level_1"] + 0.7 * terms["summary"]
    expected += terms["variance"] + 0.1 * terms["covariance"]
    np.testing.assert_allclose(outputs.scalars["loss"], expected, rtol=1e-5)


def test_sigreg_looks_along_directions_of_the_step_and_of_no_image():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 5)), jnp.float32)
    prediction = Prediction({}, {}, {}, context=None, summary=x, context_mean=None, regularized=x)
    objective, rng = Objective({"sigreg": 0.3}, num_slices=7), jax.random.PRNGKey(3)
    values = []
    for step in (0, 1):
        key = batch_rng(rng, jnp.int32(step))
        terms = loss_terms(objective, prediction, {}, key)
        expected = losses.sigreg_loss(x, losses.random_directions(key, 7, 5))
        np.testing.assert_allclose(terms["sigreg"], expected, rtol=1e-5)
        np.testing.assert_allclose(
            weighted_sum(objective.weights, terms), 0.3 * expected, rtol=1e-5
        )
        values.append(float(expected))
    assert values[0] != values[1]


def test_gradient_reaches_every_leaf_of_params():
    state, _ = make_step(ADAMW)(make_state(ADAMW), IMAGES)
    moment = optax.tree_utils.tree_get(state.opt_state, "mu")  # 0.1 times the gradient
    paths = jax.tree_util.tree_leaves_with_path(moment)
    assert jax.tree.structure(moment) == jax.tree.structure(state.params)
    assert not [jax.tree_util.keystr(path) for path, grad in paths if not np.any(grad)]


def test_gradient_does_not_reach_target_params():
    """With m = 1 the target network must not change, whatever the gradients are."""
    state = dataclasses.replace(make_state(ADAMW), step=jnp.int32(KEEPS))
    before = jax.device_get(state.target_params)
    for _ in range(3):
        state, _ = make_step(ADAMW)(state, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, state.target_params, before)


def test_ema_momentum_of_zero_copies_the_updated_parameters():
    """With m = 0 the target equals the parameters *after* the update, not before it."""
    state = dataclasses.replace(make_state(ADAMW), step=jnp.int32(COPIES))
    new, _ = make_step(ADAMW)(state, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, new.target_params, new.params["context_encoder"])
    old, changed = state.params["context_encoder"], new.target_params
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), old, changed)
    assert all(jax.tree.leaves(moved))


def test_ema_in_closed_form():
    """With constant parameters p, target t becomes m^n t + (1 - m^n) p after n updates."""
    target, params = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 5.0])}
    for _ in range(10):
        target = ema_update(target, params, 0.9)
    expected = 0.9**10 * np.array([1.0, -2.0]) + (1 - 0.9**10) * np.array([3.0, 5.0])
    np.testing.assert_allclose(target["w"], expected, rtol=1e-5)


def test_target_params_are_a_copy_and_not_the_same_buffers():
    state = make_state(ADAMW)
    pairs = zip(
        jax.tree.leaves(state.target_params),
        jax.tree.leaves(state.params["context_encoder"]),
        strict=True,
    )
    assert all(t.unsafe_buffer_pointer() != p.unsafe_buffer_pointer() for t, p in pairs)


CUT = (2, BATCH // 2, SIZE, SIZE, 3)  # a batch in two parts, as runs pass it to the step


def test_accumulated_gradient_is_the_mean_over_parts():
    """The loss is a mean over parts, too. Each part has its own batch statistics."""
    state = make_state(SGD)
    new, outputs = make_step(SGD, 2)(state, IMAGES.reshape(CUT))
    of_part = jax.jit(functools.partial(gradient, make_method(SGD)))
    keys = image_rngs(state.rng, state.step, BATCH)
    parts = [
        jax.device_get(of_part(state, IMAGES[i : i + 4], *(rngs[i : i + 4] for rngs in keys)))
        for i in (0, 4)
    ]
    (one, a), (other, b) = parts
    expected = jax.tree.map(lambda p, g, h: p - 0.1 * (g + h) / 2, state.params, one, other)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
    jax.tree.map(close, new.params, expected)
    close(outputs.scalars["loss"], (a.scalars["loss"] + b.scalars["loss"]) / 2)
    close(outputs.features, np.concatenate([a.features, b.features]), atol=1e-5)


def test_every_image_has_keys_of_its_own_at_every_step():
    rng = jax.random.PRNGKey(0)
    keys = [image_rngs(rng, jnp.int32(step), 4) for step in range(3)]
    flat = np.concatenate([np.asarray(k).reshape(-1, 2) for pair in keys for k in pair])
    assert len(np.unique(flat, axis=0)) == 3 * 2 * 4
    # The keys of an image do not depend on the batch size.
    np.testing.assert_array_equal(image_rngs(rng, jnp.int32(1), 9)[0][:4], keys[1][0])


def test_keys_are_those_of_older_versions():
    """With other keys, an older run would resume with different random draws."""
    fold, split = jax.random.fold_in, jax.random.split
    rng, step, last = jax.random.PRNGKey(3), jnp.int32(5), 2_147_483_647
    augment_rngs, mask_rngs = image_rngs(rng, step, 2)
    own = split(fold(fold(rng, 5), 1))
    np.testing.assert_array_equal([augment_rngs[1], mask_rngs[1]], own)
    np.testing.assert_array_equal(batch_rng(rng, step), fold(fold(rng, 5), last))
    np.testing.assert_array_equal(view_rngs(augment_rngs, 2)[1], fold(own[0], last - 1))


def test_fifty_steps_on_one_batch_cut_the_prediction_loss_by_a_third():
    state, step = make_state(ADAMW), make_step(ADAMW)
    state, first = step(state, IMAGES)
    for _ in range(50):
        state, last = step(state, IMAGES)
    assert last.scalars["loss_level_0"] < 0.67 * first.scalars["loss_level_0"]


def average_colour(state, images):
    """A step without networks. Its loss depends on the images and on earlier steps."""
    colours = jnp.mean(images / 255.0, axis=(1, 2))
    loss = jnp.mean(colours) + state.params["loss"]
    state = dataclasses.replace(state, step=state.step + 1, params={"loss": 0.5 * loss})
    return state, StepOutputs({"loss": loss}, colours, jnp.bool_(True))


@pytest.mark.parametrize(("size", "streamed"), [(1, False), (1, True), (3, False), (3, True)])
def test_several_steps_in_one_program_are_the_same_steps(size, streamed):
    """One program also runs any smaller number. tests/test_train.py checks real steps."""
    rng, run_steps = np.random.default_rng(1), jax.jit(make_run_steps(average_colour))
    data = jnp.asarray(rng.integers(0, 256, (40, SIZE, SIZE, 3), np.uint8))
    index = jnp.asarray(rng.integers(0, 40, (size, BATCH)), jnp.int32)
    empty = empty_window(make_averages(["loss"]), batch_size=BATCH, width=3)
    zero = TrainState(jnp.int32(0), {"loss": jnp.zeros(())}, {}, (), jax.random.PRNGKey(0))
    state, seen = zero, []
    for count in range(1, size + 1):
        state, outputs = average_colour(state, data[index[count - 1]])
        seen.append(float(outputs.scalars["loss"]))
        given = (data[index], None) if streamed else (data, index)
        together, window = run_steps(zero, empty, *given, jnp.int32(count))
        np.testing.assert_allclose(together.params["loss"], state.params["loss"], rtol=1e-5)
        assert int(together.step) == count
        values = summarize(window, spread(window, step=count, batch_size=BATCH))
        np.testing.assert_allclose(values["loss"], np.mean(seen), rtol=1e-5)
        assert 1 <= values["effective_rank"] <= 3


def test_log_window_keeps_the_newest_features():
    averages = make_averages(["loss"])
    window = empty_window(averages, batch_size=256, width=2)
    for step in range(3):
        features = jnp.full((256, 2), step + 1.0)
        loss = {"loss": jnp.float32(step)}
        window = update_window(window, loss, features, jnp.int32(step), jnp.bool_(True))
    assert sorted({float(x) for x in np.asarray(window.features)[:, 0]}) == [2.0, 3.0]
    assert summarize(window, None) == {"loss": 1.0}  # an unknown rank is left out
    emptied = reset_averages(window)
    np.testing.assert_array_equal(emptied.features, window.features)


def preprocess(images):
    return (images / 255.0 - 0.5) / 0.25


def test_embed_returns_each_level_and_the_summary():
    state = make_state(ADAMW)
    features = jax.jit(make_embed_fn(MODEL, preprocess))(state.target_params, IMAGES)
    encoder = {"params": {"context_encoder": state.target_params}}
    tokens, summary = apply(encoder, preprocess(IMAGES), method="encode")
    finest, coarse = (level.mean(axis=1) for level in hierarchy.level_features(tokens, GRID, 2))
    expected = {"level_0": finest, "level_1": coarse, "summary": summary.reshape(BATCH, -1)}
    assert features.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(features[name], value, atol=1e-5)


def test_embed_of_two_layers_adds_the_standardised_block_before_the_last():
    model = MODEL.clone(context_encoder=MODEL.context_encoder.clone(depth=2))
    rng, views = jax.random.PRNGKey(0), jnp.zeros((1, SIZE, SIZE, 3))
    params = jax.jit(model.context_encoder.init)(rng, views)["params"]
    one, two = (
        jax.jit(make_embed_fn(model, preprocess, num_layers=n))(params, IMAGES) for n in (1, 2)
    )
    assert {k: v.shape[1] for k, v in two.items()} == {k: 2 * v.shape[1] for k, v in one.items()}
    for name, value in one.items():
        np.testing.assert_allclose(two[name][:, : value.shape[1]], value, atol=1e-5)

    # The first of two blocks is the last block of an encoder with one block. The final LayerNorm
    # of that encoder does nothing at step 0.
    expected = jax.jit(make_embed_fn(MODEL, preprocess))(params, IMAGES)
    for name, value in expected.items():
        np.testing.assert_allclose(two[name][:, value.shape[1] :], value, atol=1e-4)


def test_embed_of_views_uses_the_keys():
    embed = jax.jit(make_embed_fn(MODEL, lambda images, rngs: RANDOM(rngs, images)))
    params, rngs = make_state(ADAMW).target_params, jax.random.split(jax.random.PRNGKey(3), BATCH)
    one, same, other = (embed(params, IMAGES, r)["summary"] for r in (rngs, rngs, rngs[::-1]))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("regularized", ["summary", "context", "both"])
def test_regularizer_reads_summary_tokens_context_mean_or_both(regularized):
    rng = jax.random.PRNGKey(0)
    padded = dataclasses.replace(MASK, num_context=GRID**2)
    masks = jax.jit(padded)(jax.random.split(rng, BATCH))
    seen = np.asarray(masks.context_valid)
    assert len({*seen.sum(axis=1).tolist()} - {0, GRID**2}) > 1, (
        "rows must differ in their number of padded tokens"
    )
    views = jax.jit(PLAIN)(jax.random.split(rng, BATCH), IMAGES)
    model = MODEL.clone(regularized=regularized)
    found = jax.jit(model.apply)({"params": init_params()}, views, masks)
    means = [np.mean(x[v], axis=0) for x, v in zip(np.asarray(found.context), seen, strict=True)]
    parts = {"summary": [np.asarray(found.summary)], "context": [np.stack(means)[:, None]]}
    parts["both"] = parts["summary"] + parts["context"]
    expected = np.concatenate(parts[regularized], axis=1)
    np.testing.assert_allclose(found.regularized, expected, atol=1e-5)


@pytest.mark.parametrize(("tx", "parts"), [(ADAMW, 1), (SGD, 2)], ids=["whole", "parts"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(tx, parts):
    step = make_step(tx, parts)
    good, bad = IMAGES, IMAGES.at[3, 0, 0, 0].set(255)
    good, bad = (x.reshape(CUT) if parts == 2 else x for x in (good, bad))
    state, outputs = step(make_state(tx), good)
    assert outputs.finite
    after, outputs = step(state, bad)
    assert not outputs.finite
    assert int(after.step) == int(state.step) + 1
    for name in ("params", "target_params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    moved, outputs = step(after, good)
    assert outputs.finite
    pair = jax.device_get((moved.params, state.params))
    moves = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *pair)
    assert min(jax.tree.leaves(moves)) > 0


def test_log_window_counts_steps_that_are_not_finite_and_averages_the_others():
    window = empty_window(make_averages(["loss", "x"]), batch_size=4, width=2)
    for step, loss in enumerate([1.0, np.nan, 3.0, np.inf]):
        scalars = {"loss": jnp.float32(loss), "x": jnp.float32(step)}
        features = jnp.full((4, 2), loss)
        finite = jnp.isfinite(scalars["loss"])
        window = update_window(window, scalars, features, jnp.int32(step), finite)
    values = summarize(window, None)
    assert (values["loss"], values["x"]) == (2.0, 1.0)
    assert np.isfinite(window.features).all()
    assert (int(window.nonfinite.count), int(window.nonfinite.newest)) == (2, 4)
    assert nonfinite_terms(window) == ["loss"]
    assert int(reset_averages(window).nonfinite.count) == 2
