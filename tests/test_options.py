"""Non-default options of the encoder, the predictor and the targets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hjepa_jax.masks.samplers import MultiBlockMask
from hjepa_jax.method.keys import image_rngs
from hjepa_jax.method.objective import Objective, loss_terms, weighted_sum
from hjepa_jax.method.optimizer import decay_mask, global_norm
from hjepa_jax.method.step import Method, make_train_step
from hjepa_jax.method.train_state import create_train_state
from hjepa_jax.models import hierarchy
from hjepa_jax.models.hjepa import HJEPA
from hjepa_jax.models.positions import rope2d_angles, rotate, turns_of
from hjepa_jax.models.predictor import MODES, Predictor, _groups
from hjepa_jax.models.pyramid import FUSIONS, FeaturePyramid, upsampling_matrix
from hjepa_jax.models.transformer import Attention, Block, drop_path_rates
from hjepa_jax.models.vit import VisionTransformer
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.training import train
from tests.test_steps import BATCH, GRID, IMAGES, MASK, PATCH, RANDOM, SIZE, WIDTH

RNG = np.random.default_rng(0)
ENCODER = VisionTransformer(GRID, PATCH, WIDTH, depth=1, num_heads=2, num_summary_tokens=2)
PREDICTOR = Predictor(GRID, 2, WIDTH, width=8, depth=1, num_heads=2)
RNGS = jax.random.split(jax.random.PRNGKey(0), BATCH)
MASKS = jax.jit(MASK)(RNGS)
OBJECTIVE = Objective({"level_0": 1.0, "level_1": 0.5, "summary": 1.0})
FIRST_MASK = jax.tree.map(lambda x: x[:1], MASKS)
VIEWS = jnp.asarray(RNG.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)


def make_model(encoder=None, predictor=None, **kwargs) -> HJEPA:
    encoder, predictor = ENCODER.clone(**(encoder or {})), PREDICTOR.clone(**(predictor or {}))
    return HJEPA(encoder, predictor, **kwargs)


@functools.cache
def init_params(model: HJEPA):
    """Returns the parameters as NumPy arrays, because arithmetic on those compiles nothing."""
    params = jax.jit(model.init)(jax.random.PRNGKey(1), VIEWS[:1], FIRST_MASK)["params"]
    return jax.device_get(params)


@functools.cache
def jitted(model: HJEPA):
    return jax.jit(model.apply, static_argnames="method")


def predict(model: HJEPA, params=None, masks=MASKS, views=VIEWS):
    return jitted(model)({"params": params or init_params(model)}, views, masks)


def encode(model: HJEPA, encoder_params, views):
    variables = {"params": {"context_encoder": encoder_params}}
    return jitted(model)(variables, views, method="encode")


@pytest.mark.parametrize("shift", [(1, 0), (0, 3), (2, 5)])
def test_rotated_scores_depend_on_relative_position_alone(shift):
    grid, width, shift = (12, 13), 8, np.array(shift)
    turns = turns_of(jnp.asarray(rope2d_angles(grid, width))[None]).reshape(*grid, -1)
    turned = jax.jit(lambda x, row, col: rotate(x, turns[row, col][None, None]))
    query, key = jnp.asarray(RNG.normal(size=(2, 1, 1, 1, width)), jnp.float32)
    score = lambda place, other: float(np.sum(turned(query, *place) * turned(key, *other)))
    here, there = np.array([3, 1]), np.array([5, 4])
    expected = score(here, there)
    np.testing.assert_allclose(score(here + shift, there + shift), expected, rtol=1e-4, atol=1e-5)
    assert abs(expected - score(here, [5, 5])) > 1e-3
    assert abs(expected - score(here, [6, 4])) > 1e-3
    length = np.linalg.norm(turned(query, 7, 9))
    np.testing.assert_allclose(length, np.linalg.norm(query), rtol=1e-5)


def test_a_rotary_encoder_sees_relative_positions_alone():
    """If all patches move by the same offset, their encoding stays the same.

    This holds without summary tokens: those have no position.
    """
    encoder = ENCODER.clone(positions="rope2d", num_summary_tokens=0)
    block, down, right = np.array([0, 1, 2, 4, 5, 6, 8, 9, 10]), 1, 1  # 3 x 3 of the 4 x 4 patches
    moved = np.roll(VIEWS, (PATCH * down, PATCH * right), axis=(1, 2))
    params = jax.jit(encoder.init)(jax.random.PRNGKey(0), VIEWS)
    apply = jax.jit(encoder.apply)
    indices = (np.tile(block + shift, (BATCH, 1)) for shift in (0, down * GRID + right))
    here, there = (
        apply(params, views, jnp.asarray(index, jnp.int32))[0]
        for views, index in zip((VIEWS, jnp.asarray(moved)), indices, strict=True)
    )
    np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)
    shuffled = apply(params, VIEWS, jnp.asarray(np.tile(block[::-1], (BATCH, 1)), jnp.int32))[0]
    np.testing.assert_allclose(shuffled[:, ::-1], here, rtol=1e-4, atol=1e-5)
    apart = apply(params, VIEWS, jnp.asarray(np.tile(block[:2], (BATCH, 1)), jnp.int32))[0]
    other = np.asarray(VIEWS).copy()  # the second of the two patches, moved one patch to the right
    other[:, :PATCH, 2 * PATCH : 3 * PATCH] = other[:, :PATCH, PATCH : 2 * PATCH]
    far = jnp.asarray(np.tile([0, 2], (BATCH, 1)), jnp.int32)
    assert np.abs(np.asarray(apply(params, jnp.asarray(other), far)[0]) - apart).max() > 1e-3


def test_permuted_patches_permute_tokens_and_keep_the_summary():
    encoder = ENCODER.clone(positions="rope2d", num_registers=1)
    params = jax.jit(encoder.init)(jax.random.PRNGKey(0), VIEWS)
    apply, order = jax.jit(encoder.apply), RNG.permutation(GRID**2)
    tokens, summary = apply(params, VIEWS)
    shuffled, same = apply(params, VIEWS, jnp.asarray(np.tile(order, (BATCH, 1)), jnp.int32))
    np.testing.assert_allclose(shuffled, np.asarray(tokens)[:, order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(same, summary, rtol=1e-4, atol=1e-5)


def test_cosines_are_computed_once_for_all_blocks_and_both_passes():
    encoder = ENCODER.clone(positions="rope2d", depth=3)
    params = jax.eval_shape(encoder.init, jax.random.PRNGKey(0), VIEWS)
    index = jnp.asarray(np.tile([0, 3], (BATCH, 1)), jnp.int32)
    loss = lambda params: jnp.sum(encoder.apply(params, VIEWS, index)[1] ** 2)
    program = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert program.count("stablehlo.cosine ") == program.count("stablehlo.sine ") == 1


def test_the_angle_of_a_cell_is_that_of_its_centre():
    cells = np.asarray(hierarchy.pool(jnp.asarray(rope2d_angles(8, 8)), 8, 1))
    frequency = 100.0 ** -np.array([0.0, 0.5])
    np.testing.assert_allclose(cells[5], 2.5 * np.tile(frequency, 2), rtol=1e-5)


@pytest.mark.slow
def test_a_rotary_model_knows_positions_and_runs_at_one_and_a_half_times_the_resolution():
    model = make_model({"positions": "rope2d"}, {"positions": "rope2d"})
    params = init_params(model)
    assert "positions" not in params["context_encoder"]
    tokens, _ = encode(model, params["context_encoder"], VIEWS)
    order = RNG.permutation(GRID**2)
    blocks = VIEWS.reshape(BATCH, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(BATCH, GRID**2, PATCH, PATCH, 3)[:, order]
    moved = blocks.reshape(BATCH, GRID, GRID, PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    moved_tokens, _ = encode(model, params["context_encoder"], moved.reshape(VIEWS.shape))
    assert np.abs(np.asarray(tokens)[:, order] - moved_tokens).max() > 1e-3

    side = GRID * 3 // 2
    larger = make_model(
        {"positions": "rope2d", "grid_size": side}, {"positions": "rope2d", "grid_size": side}
    )
    mask = MultiBlockMask(side, 2, (0.1, 0.25), align_level=1)
    views = jnp.asarray(RNG.normal(size=(2, side * PATCH, side * PATCH, 3)), jnp.float32)
    prediction = predict(larger, params, mask(RNGS[:2]), views)
    assert prediction.levels[1].shape == (2, 9, WIDTH)
    assert all(np.isfinite(level).all() for level in prediction.levels.values())


@pytest.mark.parametrize("mode", MODES)
def test_rotary_queries_with_one_summary_token_depend_on_their_position(mode):
    encoder = {"positions": "rope2d", "num_summary_tokens": 1}
    prediction = predict(make_model(encoder, {"positions": "rope2d", "mode": mode}))
    for levels in (prediction.levels, prediction.summary_levels):
        assert [levels[n].shape for n in (0, 1)] == [(BATCH, 8, WIDTH), (BATCH, 4, WIDTH)]
        for level in levels.values():
            assert np.asarray(level).std(axis=1).max() > 1e-4
            assert np.isfinite(level).all()


# For each mode, three answers. Does the prediction of a block depend on the patches of other
# blocks? Does it depend on the other patches of its own block? Does the context attend to the
# queries, so that they change the predictions of the coarse level?
DEPENDS = {"self": (True, True, True), "blocks": (False, True, False), "cross": (False,) * 3}


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_decides_which_queries_affect_a_prediction(mode):
    model, size = make_model(None, {"mode": mode}), MASKS.target_index.shape[2]
    # At initialisation the residual branches are weak. Larger parameters show the dependencies.
    params = jax.tree.map(lambda x: 3 * x, init_params(model))
    moved = (MASKS.target_index + 5) % GRID**2
    others = MASKS.replace(target_index=moved.at[:, 0].set(MASKS.target_index[:, 0]))
    last = MASKS.replace(target_index=MASKS.target_index.at[:, 0, -1].set(moved[:, 0, -1]))
    found = [predict(model, params, masks).levels[0] for masks in (MASKS, others, last)]
    context = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 2, WIDTH)), jnp.float32)
    apply = jax.jit(functools.partial(model.predictor.apply, num_blocks=2))
    coarse = [
        apply(
            {"params": params["predictor"]},
            context,
            context_valid=jnp.ones((BATCH, 2), bool),
            target_index=masks.target_index.reshape(BATCH, -1),
            query_valid={0: masks.target_valid.reshape(BATCH, -1), 1: jnp.ones((BATCH, 4), bool)},
        )[1]
        for masks in (MASKS, others)
    ]
    pairs = (
        (found[0][:, :size], found[1][:, :size]), (found[0][:, 0], found[2][:, 0]), coarse,
    )  # fmt: skip
    assert tuple(not np.allclose(a, b, atol=1e-5) for a, b in pairs) == DEPENDS[mode]


def test_cross_attention_by_hand():
    """One head, one query, two keys: a softmax over two scores."""
    attention = Attention(1, cross=True)
    x, source = (jnp.asarray(RNG.normal(size=(1, n, 4)), jnp.float32) for n in (1, 2))
    params = jax.jit(attention.init)(jax.random.PRNGKey(0), x, memory=source)["params"]
    query, pair = (np.asarray(params[name]["kernel"]) for name in ("query", "key_value"))
    one, two = np.asarray(x[0]), np.asarray(source[0])
    score = np.exp((one @ query @ (two @ pair[:, :4]).T)[0] / 2)
    expected = score / score.sum() @ two @ pair[:, 4:] @ np.asarray(params["out"]["kernel"])
    out = jax.jit(attention.apply)({"params": params}, x, memory=source)
    np.testing.assert_allclose(out[0, 0], expected, rtol=1e-4)


def test_registers_are_attended_to_and_not_returned():
    plain, model = make_model(), make_model({"num_registers": 3})
    params = init_params(model)
    assert params["context_encoder"]["register_tokens"].shape == (1, 3, WIDTH)
    prediction = predict(model)
    assert prediction.summary.shape == (BATCH, 2, WIDTH)
    assert prediction.context.shape == predict(plain).context.shape
    changed = jax.tree.map(lambda x: x, params)
    # Negated instead of shifted: the LayerNorm of the first block would remove a shift.
    changed["context_encoder"]["register_tokens"] = -changed["context_encoder"]["register_tokens"]
    assert np.abs(predict(model, changed).context - prediction.context).max() > 1e-4


def test_layer_scale_multiplies_each_branch_and_is_not_decayed():
    x = jnp.asarray(RNG.normal(size=(2, 5, WIDTH)), jnp.float32)
    plain, scaled = Block(2), Block(2, layer_scale=0.5)
    apply = jax.jit(scaled.apply)
    params = jax.jit(scaled.init)(jax.random.PRNGKey(0), x)["params"]
    names = ("scale_attention", "scale_mlp")
    for name in names:
        np.testing.assert_array_equal(params[name]["scale"], np.full(WIDTH, 0.5, np.float32))
        assert not decay_mask(params)[name]["scale"]
    scaled_by = lambda factor: {"params": params | {n: {"scale": factor} for n in names}}
    np.testing.assert_array_equal(apply(scaled_by(jnp.zeros(WIDTH)), x), x)
    without = {"params": {name: leaf for name, leaf in params.items() if name not in names}}
    expected = jax.jit(plain.apply)(without, x)
    np.testing.assert_allclose(apply(scaled_by(jnp.ones(WIDTH)), x), expected, atol=1e-6)


def test_remat_changes_no_number_and_no_parameter():
    plain, again = make_model(), make_model({"remat": True}, {"remat": True})
    params = init_params(plain)
    assert jax.tree.structure(init_params(again)) == jax.tree.structure(params)

    def loss(model, params):
        prediction = model.apply({"params": params}, VIEWS, MASKS)
        return sum(jnp.sum(level**2) for level in prediction.levels.values())

    losses = [functools.partial(loss, model) for model in (plain, again)]
    grads = [jax.jit(jax.grad(fn))(params) for fn in losses]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, *grads)
    assert ["remat" in str(jax.make_jaxpr(fn)(params)) for fn in losses] == [False, True]


@pytest.mark.parametrize(("grid", "fusion"), [(4, "add"), (5, "concat"), (14, "add")])
def test_a_pyramid_of_identity_weights_is_pooling(grid, fusion):
    pyramid = FeaturePyramid(grid, 3, fusion)
    tokens = jnp.asarray(RNG.normal(size=(2, grid**2, 8)), jnp.float32)
    pooled = tuple(hierarchy.pool(tokens, grid, level) for level in range(3))
    params = jax.jit(pyramid.init)(jax.random.PRNGKey(0), pooled)
    for level, fused in zip(pooled, jax.jit(pyramid.apply)(params, pooled), strict=True):
        np.testing.assert_allclose(level, fused, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (14, 5)])
def test_upsampling_reproduces_linear_functions_between_the_centres(grid):
    def centres(side, size):
        return [(start + min(start + size, side)) / 2 for start in range(0, side, size)]

    coarse = [centres(side, 2) for side in grid]
    matrix = upsampling_matrix(grid, 0).reshape(*grid, *map(len, coarse))
    plane = 2 * np.array(coarse[0])[:, None] + 3 * np.array(coarse[1])[None]
    inside = [np.clip(centres(s, 1), c[0], c[-1]) for s, c in zip(grid, coarse, strict=True)]
    expected = 2 * inside[0][:, None] + 3 * inside[1][None]
    np.testing.assert_allclose(np.einsum("ijkl,kl->ij", matrix, plane), expected, rtol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_pyramid_of_any_weights_against_numpy(fusion):
    grid, width, sides = 5, 2, (5, 3, 2)
    pyramid = FeaturePyramid(grid, 3, fusion)
    levels = tuple(jnp.asarray(RNG.normal(size=(2, side**2, width)), jnp.float32) for side in sides)
    params = jax.jit(pyramid.init)(jax.random.PRNGKey(0), levels)["params"]
    assert not any(jax.tree.leaves(decay_mask({"pyramid": params})))
    params = jax.tree.map(lambda x: np.asarray(RNG.normal(size=x.shape), np.float32), params)
    fuse = jax.jit(pyramid.apply)
    found = fuse({"params": params}, levels)

    weights = {name: np.asarray(next(iter(leaf.values()))) for name, leaf in params.items()}
    x = [np.asarray(level) @ weights[f"lateral_{i}"] for i, level in enumerate(levels)]
    centres = [np.arange(5) + 0.5, np.array([1.0, 3.0, 4.5]), np.array([2.0, 4.5])]
    for i in (1, 0):
        above = x[i + 1].reshape(2, sides[i + 1], sides[i + 1], width)
        for axis in (1, 2):
            above = np.apply_along_axis(
                lambda y, i=i: np.interp(centres[i], centres[i + 1], y), axis, above
            )
        above = above.reshape(2, sides[i] ** 2, width)
        if fusion == "add":
            x[i] = x[i] + weights[f"top_down_{i}"] * above
        else:
            x[i] = np.concatenate([x[i], above], axis=-1) @ weights[f"fusion_{i}"]
    for one, other in zip(found, x, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

    index = jnp.asarray([[3, 0, 24], [7, 7, 12]])  # other patches for each image
    chosen = jnp.take_along_axis(levels[0], index[..., None], axis=1)
    few = fuse({"params": params}, (chosen, *levels[1:]), index)
    expected = np.take_along_axis(x[0], np.asarray(index)[..., None], axis=1)
    np.testing.assert_allclose(few[0], expected, rtol=1e-4, atol=1e-4)


def test_predictions_go_through_the_pyramid_and_targets_through_its_ema():
    pyramid = FeaturePyramid(GRID, 2, "add")
    plain, model = make_model(), make_model({"pyramid": pyramid})
    step, state = make_step(model)
    # With noise on all weights, neither pyramid is the identity, and the two pyramids differ.
    noisy = lambda x: x + 0.1 * RNG.normal(size=x.shape).astype(np.float32)
    params, target_params = jax.tree.map(noisy, jax.device_get((state.params, state.target_params)))
    state = dataclasses.replace(state, params=params, target_params=target_params)
    new_state, outputs = jax.device_get(step(state, IMAGES))

    views, masks = views_and_masks(state)
    online, ema = params["context_encoder"].pop("pyramid"), target_params.pop("pyramid")
    prediction = predict(plain, params, masks, views)
    tokens, _ = encode(plain, target_params, views)

    @jax.jit
    def expected_loss(online, ema, prediction, tokens, index):
        fuse = lambda x: dict(enumerate(pyramid.apply({"params": online}, (x[0], x[1]), index)))
        pooled = hierarchy.level_features(tokens, GRID, 2)
        finest, coarse = map(hierarchy.standardize, pyramid.apply({"params": ema}, pooled))
        targets = {0: jnp.take_along_axis(finest, index[..., None], axis=1), 1: coarse}
        levels = {name: fuse(getattr(prediction, name)) for name in ("levels", "summary_levels")}
        return loss_of(dataclasses.replace(prediction, **levels), targets)

    index = masks.target_index.reshape(BATCH, -1)
    expected = expected_loss(online, ema, prediction, tokens, index)
    np.testing.assert_allclose(outputs.scalars["loss"], expected, rtol=1e-3)
    moved = new_state.params["context_encoder"]["pyramid"]
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, ema, moved)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, new_state.target_params["pyramid"], expected)


def loss_of(prediction, targets, objective=OBJECTIVE):
    terms = loss_terms(objective, prediction, targets, jax.random.PRNGKey(0))
    return weighted_sum(objective.weights, terms)


def make_step(model, *, tx=None, ema_momentum=0.9, objective=OBJECTIVE, **kwargs):
    tx = tx or optax.sgd(0.1)
    method = Method(
        model=model,
        tx=tx,
        sample_masks=MASK,
        augment=RANDOM,
        objective=objective,
        ema_momentum_fn=None if ema_momentum is None else lambda s: jnp.float32(ema_momentum),
        **kwargs,
    )
    create = lambda params: create_train_state(params, tx, jax.random.PRNGKey(2))
    state = jax.jit(create)(init_params(model))
    return jax.jit(make_train_step(method)), state


def losses_of(step, state):
    """Returns the loss terms of a step. Its gradients are not compiled, as no term needs them."""
    scalars = lambda state: step(state, IMAGES)[1].scalars
    names = [name for name in jax.eval_shape(scalars, state) if name.startswith("loss")]
    return jax.jit(lambda state: {name: scalars(state)[name] for name in names})(state)


@functools.cache
def views_and_masks_fn():
    def views_and_masks(rng, step):
        augment_rngs, mask_rngs = image_rngs(rng, step, BATCH)
        return RANDOM(augment_rngs, IMAGES), MASK(mask_rngs)

    return jax.jit(views_and_masks)


def views_and_masks(state):
    return views_and_masks_fn()(state.rng, state.step)


@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_an_image_of_another_size_lies_on_the_same_field_of_positions(positions):
    """A patch of an image of half the size has the position of 2 x 2 patches of the full image.

    The images are constant, so only the positions distinguish their patches.
    """
    model = make_model({"positions": positions})
    params = init_params(model)["context_encoder"]
    fine = encode(model, params, jnp.ones((1, SIZE, SIZE, 3)))[0]
    coarse = encode(model, params, jnp.ones((1, SIZE // 2, SIZE // 2, 3)))[0]
    assert coarse.shape == (1, GRID**2 // 4, WIDTH)
    centres = hierarchy.pool(fine, GRID, 1)
    distance = np.linalg.norm(np.asarray(coarse)[0, :, None] - np.asarray(centres)[0], axis=-1)
    np.testing.assert_array_equal(distance.argmin(axis=1), np.arange(4))


@pytest.mark.slow
def test_without_ema_the_gradient_flows_through_the_targets_and_the_encoder_is_judged():
    model = make_model(summary_pass=False)
    objective = Objective({"level_0": 1.0, "level_1": 0.5})
    step, state = make_step(model, ema_momentum=None, objective=objective)
    new_state, outputs = step(state, IMAGES)
    views, masks = views_and_masks(state)
    index = masks.target_index.reshape(BATCH, -1, 1)

    def loss_fn(params, target_params):
        encoder = {"params": {"context_encoder": target_params}}
        tokens, _ = model.apply(encoder, views, method="encode")
        finest, coarse = hierarchy.level_features(tokens, GRID, 2)
        targets = {0: jnp.take_along_axis(finest, index, axis=1), 1: coarse}
        return loss_of(model.apply({"params": params}, views, masks), targets, objective)

    @jax.jit
    def norms(params):
        """Returns the gradient norms with and without the gradient through the targets."""
        stopped, through = jax.grad(loss_fn, argnums=(0, 1))(params, params["context_encoder"])
        encoder = jax.tree.map(jnp.add, stopped["context_encoder"], through)
        return global_norm({**stopped, "context_encoder": encoder}), global_norm(stopped)

    close = np.isclose(outputs.scalars["grad_norm"], norms(state.params), rtol=1e-3)
    assert close.tolist() == [True, False]
    online = new_state.params["context_encoder"]
    jax.tree.map(np.testing.assert_array_equal, new_state.target_params, online)


def test_stochastic_depth_is_drawn_anew_in_every_step_and_spares_the_targets():
    step, state = make_step(make_model({"drop_path": 0.5}))
    names = ("loss", "target_std")  # only these, so the gradients are not compiled
    scalars = jax.jit(lambda state: [step(state, IMAGES)[1].scalars[name] for name in names])
    found = [scalars(state.replace(step=jnp.int32(n))) for n in (0, 0, 1)]
    (loss, target_std), (again, _), (other, _) = jax.device_get(found)
    assert loss == again != other
    tokens, _ = encode(make_model(), state.target_params, views_and_masks(state)[0])
    expected = np.asarray(tokens).mean(axis=1).std(axis=0).mean()
    np.testing.assert_allclose(target_std, expected, rtol=1e-5)


def test_kept_branches_are_rescaled_and_deep_ones_dropped_more():
    x = jnp.asarray(RNG.normal(size=(256, 3, 8)), jnp.float32)
    block, dropping = Block(2, 2.0), Block(2, 2.0, drop_path=0.25)
    params = jax.device_get(jax.jit(block.init)(jax.random.PRNGKey(0), x))
    params = jax.tree.map(lambda p: p + np.float32(0.1), params)
    silent = jax.tree.map(np.zeros_like, params["params"]["attention"])
    params = {"params": {**params["params"], "attention": silent}}  # only the MLP branch is left
    branch = jax.jit(block.apply)(params, x) - x
    found = jax.jit(dropping.apply)(params, x, rngs={"drop_path": jax.random.PRNGKey(1)}) - x
    kept = np.abs(np.asarray(found)).max(axis=(1, 2)) > 0
    assert 0.65 < kept.mean() < 0.85
    np.testing.assert_allclose(found[kept], branch[kept] / 0.75, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(drop_path_rates(4, 0.3), [0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(1, 0.3) == [0.3]


def test_each_block_and_each_coarser_level_is_a_group_of_its_own():
    assert _groups(2, 3, {0: 6, 1: 4}).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert _groups(2, 3, {1: 4}).tolist() == [0, 0, 1, 1, 1, 1], "coarse cells are a single group"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {
            "model.positions": "rope2d", "model.num_registers": 2, "model.layer_scale": 0.1,
            "model.predictor_mode": "blocks", "model.drop_path": 0.1, "model.remat": True,
            "loss.agreement_weight": 1.0, "data.local_views": 2, "data.local_size": 8,
            "data.local_patches": 3, "model.pyramid": "add",
        },
        {
            "model.predictor_mode": "cross", "loss.level_weights": (0.0, 1.0),
            "model.target": "online", "loss.regularizer": "sigreg", "loss.regularized": "both",
            "optim.accumulation_steps": 2, "model.drop_path": 0.1,
        },
    ],
    ids=("views", "online"),
)  # fmt: skip
def test_a_config_builds_and_trains_with_its_options(tiny_config, overrides, tmp_path):
    with tiny_config.unlocked():
        tiny_config.update_from_flattened_dict(overrides)
    train.train_and_evaluate(tiny_config, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert np.isfinite(lines[-1]["train/loss"])
    assert ("train/loss_agreement" in lines[-1]) == ("loss.agreement_weight" in overrides)
    assert ("train/loss_level_0" in lines[-1]) == ("loss.level_weights" not in overrides)
    assert ("train/ema_momentum" in lines[-1]) == ("model.target" not in overrides)
