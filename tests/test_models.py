"""The encoder, the predictor and the model that combines them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.masks.samplers import MultiBlockMask
from hjepa_jax.models.hjepa import HJEPA
from hjepa_jax.models.matmul import Precision
from hjepa_jax.models.positions import sincos2d_positions, turns_of
from hjepa_jax.models.predictor import MODES, Predictor
from hjepa_jax.models.stem import PatchMLP
from hjepa_jax.models.transformer import Block, layer_norm
from hjepa_jax.models.vit import VisionTransformer, patchify

GRID, PATCH, WIDTH = 4, 4, 16
RNG = np.random.default_rng(0)


def make_model(num_levels: int = 2, **kwargs) -> HJEPA:
    return HJEPA(
        VisionTransformer(GRID, PATCH, WIDTH, depth=1, num_heads=2, num_summary_tokens=2),
        Predictor(GRID, num_levels, WIDTH, width=8, depth=2, num_heads=2),
        **kwargs,
    )


def images(batch: int = 3) -> jax.Array:
    return jnp.asarray(RNG.normal(size=(batch, GRID * PATCH, GRID * PATCH, 3)), jnp.float32)


@functools.cache
def jitted(model: HJEPA):
    return jax.jit(model.apply, static_argnames="method")


MASK = MultiBlockMask(GRID, 2, (0.25, 0.25), (1.0, 1.0), align_level=1, context_scale=(1.0, 1.0))
MASKS = MASK(jax.random.split(jax.random.PRNGKey(0), 3))


@pytest.fixture(scope="module")
def model_and_params():
    model = make_model()
    return model, jax.jit(model.init)(jax.random.PRNGKey(0), images(), MASKS)


def test_patchify_keeps_rows_columns_and_channels_in_order():
    x = jnp.arange(1 * 4 * 4 * 3, dtype=jnp.float32).reshape(1, 4, 4, 3)
    patches = patchify(x, 2)
    np.testing.assert_array_equal(patches[0, 1], np.asarray(x)[0, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(patches[0, 2], np.asarray(x)[0, 2:, :2].reshape(-1))


def test_sincos_positions_are_distinct_and_bounded():
    table = sincos2d_positions(14, 64)
    assert len(np.unique(table.round(5), axis=0)) == 196
    assert np.abs(table).max() <= 1
    # Along a row, only the second half of the features (the column) changes.
    np.testing.assert_array_equal(table[0, :32], table[1, :32])
    assert np.any(table[0, 32:] != table[1, 32:])
    tall = sincos2d_positions((14, 3), 64).reshape(14, 3, 64)
    np.testing.assert_array_equal(tall, table.reshape(14, 14, 64)[:, :3])


def test_subset_of_all_patches_in_another_order_gives_the_same_tokens(model_and_params):
    model, variables = model_and_params
    x, order = images(2), np.array([RNG.permutation(GRID**2) for _ in range(2)])
    tokens, summary = jitted(model)(variables, x, method="encode")
    shuffled, summary_2 = jitted(model)(variables, x, jnp.asarray(order), method="encode")
    np.testing.assert_allclose(
        shuffled, np.take_along_axis(np.asarray(tokens), order[..., None], 1), atol=1e-5
    )
    np.testing.assert_allclose(summary, summary_2, atol=1e-5)


def test_pixels_of_hidden_patches_do_not_reach_one_context_token(model_and_params):
    model, variables = model_and_params
    x = images()
    visible = np.zeros((3, GRID**2), bool)
    index, valid = np.asarray(MASKS.context_index), np.asarray(MASKS.context_valid)
    for row in range(3):
        visible[row, index[row][valid[row]]] = True
    pixels = np.repeat(np.repeat(visible.reshape(3, GRID, GRID), PATCH, 1), PATCH, 2)
    noisy = jnp.where(pixels[..., None], x, 100.0)
    a, b = (jitted(model)(variables, i, MASKS) for i in (x, noisy))
    np.testing.assert_array_equal(a.context[valid], b.context[valid])
    np.testing.assert_array_equal(a.summary, b.summary)
    jax.tree.map(np.testing.assert_array_equal, a.levels, b.levels)
    # Control: visible pixels do reach the summary.
    seen = jnp.where(pixels[..., None], x + 1.0, x)
    assert np.any(jitted(model)(variables, seen, MASKS).summary != a.summary)


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_no_valid_output(mode):
    model = make_model()
    model = model.clone(predictor=model.predictor.clone(mode=mode))
    x = images()
    variables = jax.jit(model.init)(jax.random.PRNGKey(0), x, MASKS)
    twice = lambda x, other: jnp.concatenate([x, jnp.full_like(x, other)], axis=-1)
    more = MASKS.replace(
        context_index=twice(MASKS.context_index, 5),
        context_valid=twice(MASKS.context_valid, False),
        target_index=twice(MASKS.target_index, 3),
        target_valid=twice(MASKS.target_valid, False),
    )
    a, b = jitted(model)(variables, x, MASKS), jitted(model)(variables, x, more)
    np.testing.assert_allclose(a.summary, b.summary, atol=1e-5)
    for levels in ("levels", "summary_levels"):
        for n in (0, 1):
            found = (getattr(out, levels)[n][out.query_valid[n]] for out in (a, b))
            np.testing.assert_allclose(*found, atol=1e-5)


def test_predictions_follow_their_queries_when_blocks_change_places(model_and_params):
    model, variables = model_and_params
    x, t = images(), MASKS.target_index.shape[-1]
    swapped = MASKS.replace(
        target_index=MASKS.target_index[:, ::-1], target_valid=MASKS.target_valid[:, ::-1]
    )
    a, b = (jitted(model)(variables, x, m).levels[0] for m in (MASKS, swapped))
    np.testing.assert_allclose(a[:, :t], b[:, t:], atol=1e-5)
    np.testing.assert_allclose(a[:, t:], b[:, :t], atol=1e-5)


def test_summary_pass_sees_no_patch_token(model_and_params):
    """Its predictions equal the output of the predictor for the summary tokens alone."""
    model, variables = model_and_params
    prediction = jitted(model)(variables, images(), MASKS)
    bound = model.bind(variables)
    levels = bound.predictor(
        prediction.summary,
        context_valid=jnp.ones((3, 2), bool),
        target_index=MASKS.target_index.reshape(3, -1),
        query_valid=bound.query_valid(MASKS),
    )
    assert {n: x.shape for n, x in levels.items()} == {0: (3, 8, WIDTH), 1: (3, 4, WIDTH)}
    for level, expected in levels.items():
        found, full = prediction.summary_levels[level], prediction.levels[level]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.abs(np.asarray(found) - full).max() > 1e-3  # `full` sees the patches


def test_an_image_without_visible_patches_predicts_nothing():
    """Four random quarters are hidden. In a tenth of the images they cover the whole image."""
    mask = MultiBlockMask(8, 4, (0.25, 0.25), (1.0, 1.0), align_level=2)
    masks = jax.jit(mask)(jax.random.split(jax.random.PRNGKey(0), 200))
    encoder = VisionTransformer(8, PATCH, WIDTH, depth=1, num_heads=2)
    model = HJEPA(encoder, Predictor(8, 2, WIDTH, width=8, depth=1, num_heads=2))
    shows = np.asarray(masks.context_valid).any(axis=1)
    assert 5 < np.sum(~shows) < 40
    for level in model.apply({}, masks, method="query_valid").values():
        np.testing.assert_array_equal(np.asarray(level).any(axis=1), shows)


def test_an_image_without_patches_gets_the_mean_of_the_others(model_and_params):
    model, variables = model_and_params
    none = dataclasses.replace(
        MASKS, context_valid=MASKS.context_valid & (jnp.arange(3)[:, None] > 0)
    )
    x = images()
    plain, found = (
        np.asarray(jitted(model)(variables, x, masks).context_mean) for masks in (MASKS, none)
    )
    np.testing.assert_array_equal(found[1:], plain[1:])
    np.testing.assert_allclose(found[0], plain[1:].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("num_levels", [1, 3])
def test_a_grid_of_14_works_with_any_number_of_levels(num_levels):
    model = HJEPA(
        VisionTransformer(14, 2, WIDTH, depth=1, num_heads=2, positions="sincos2d"),
        Predictor(14, num_levels, WIDTH, width=8, depth=1, num_heads=2, positions="sincos2d"),
    )
    mask = MultiBlockMask(14, 2, (0.1, 0.35), align_level=num_levels - 1)
    masks = mask(jax.random.split(jax.random.PRNGKey(0), 2))
    x = jnp.zeros((2, 28, 28, 3))
    out, _ = jax.eval_shape(model.init_with_output, jax.random.PRNGKey(0), x, masks)
    cells = [level.shape[1] for level in out.levels.values()]
    assert cells == [masks.target_index[0].size, 49, 16][:num_levels]


@pytest.mark.parametrize("results", [jnp.float32, jnp.bfloat16])
def test_bfloat16_computes_close_to_float32(results):
    x = images()
    encoder = make_model().context_encoder
    params = jax.jit(encoder.init)(jax.random.PRNGKey(0), x)
    low = encoder.clone(precision=Precision(jnp.bfloat16, results))
    a, b = jax.jit(encoder.apply)(params, x), jax.jit(low.apply)(params, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, a, b)))
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=0.1), a, b)
    assert np.any(np.asarray(a[0]) != np.asarray(b[0]))


def test_learned_positions_start_from_the_sine_cosine_table(model_and_params):
    _, variables = model_and_params
    params = variables["params"]
    for network, width in (("context_encoder", WIDTH), ("predictor", 8)):
        tables = params[network]
        table = tables["positions" if network == "context_encoder" else "position_table"]
        np.testing.assert_array_equal(table["embedding"], sincos2d_positions(GRID, width))
    fixed = make_model().context_encoder.clone(positions="sincos2d")
    assert "positions" not in jax.eval_shape(fixed.init, jax.random.PRNGKey(0), images())["params"]


def test_residual_branches_start_smaller_the_deeper_the_network():
    """Kernels that write to the residual stream start at Xavier's scale / sqrt(2 depth).

    The other kernels start at Xavier's scale.
    """
    encoder = VisionTransformer(GRID, PATCH, 64, depth=2, num_heads=2)
    params = jax.jit(encoder.init)(jax.random.PRNGKey(0), images(1))["params"]
    for block in (params["block_0"], params["block_1"]):
        for kernel, scale in (
            (block["attention"]["qkv"]["kernel"], 1.0),
            (block["attention"]["out"]["kernel"], 0.5),
            (block["mlp_in"]["kernel"], 1.0),
            (block["mlp_out"]["kernel"], 0.5),
        ):
            xavier = np.sqrt(2 / sum(kernel.shape))
            np.testing.assert_allclose(np.std(kernel), scale * xavier, rtol=0.05)


def test_a_block_with_memory_equals_one_on_the_full_sequence():
    """With `memory`, a block only skips the outputs of the memory tokens, which nobody needs."""
    block = Block(num_heads=2)
    x = jnp.asarray(RNG.normal(size=(2, 7, 16)), "f")
    allowed = jnp.asarray(RNG.random((2, 7, 7)) < 0.7)
    turns = turns_of(jnp.asarray(RNG.normal(size=(2, 7, 4)), "f"))  # two heads of 8
    params = jax.jit(block.init)(jax.random.PRNGKey(0), x)
    apply, queries = jax.jit(block.apply), x[:, 3:]
    beside = apply(params, x, allowed=allowed, turns=turns)[:, 3:]
    found = apply(params, queries, memory=x[:, :3], allowed=allowed[:, 3:], turns=turns)
    np.testing.assert_allclose(found, beside, rtol=1e-4, atol=1e-5)
    alone = apply(params, queries, allowed=allowed[:, 3:, 3:], turns=turns[:, 3:])
    assert np.abs(found - alone).max() > 0.01


def test_the_gradient_of_a_block_pads_nothing():
    """Query, key and value are separate products with slices of the kernel.

    Slices of one combined product would have a gradient that is a sum of padded parts.
    """
    encoder = VisionTransformer(GRID, PATCH, WIDTH, depth=2, num_heads=2)
    params = jax.eval_shape(encoder.init, jax.random.PRNGKey(0), images(1))

    def loss(params, x):
        patches, summary = encoder.apply(params, x)
        return jnp.sum(patches**2) + jnp.sum(summary**2)

    assert "stablehlo.pad" not in jax.jit(jax.grad(loss)).lower(params, images(1)).as_text()


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
def test_layer_norm_is_right_if_the_mean_is_large(mean):
    """`mean` is in standard deviations. At 1000, mean(x^2) - mean^2 was 11 % off."""
    x = (mean + np.random.default_rng(0).normal(size=(4, 192))).astype(np.float32)
    exact = x.astype(np.float64) - x.mean(axis=1, dtype=np.float64, keepdims=True)
    exact /= np.sqrt(x.astype(np.float64).var(axis=1, keepdims=True) + 1e-6)
    norm = layer_norm()
    found = norm.apply(norm.init(jax.random.PRNGKey(0), x), x)
    np.testing.assert_allclose(found, exact, atol=2e-4)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_the_hmlp_stem_is_convolutions_within_each_patch(patch_size):
    """In NumPy: sums over the pixels of each cell, with LayerNorm and GELU between layers."""
    stem = PatchMLP(32, patch_size)
    patches = RNG.normal(size=(2, 3, patch_size**2 * 2)).astype(np.float32)
    params = jax.device_get(jax.jit(stem.init)(jax.random.PRNGKey(0), patches))["params"]
    params = jax.tree.map(lambda p: p + np.float32(0.1), params)
    found = jax.jit(stem.apply)({"params": params}, patches)
    x = patches.astype(np.float64).reshape(6, patch_size, patch_size, 2)
    strides = {4: [2, 2], 8: [2, 2, 2], 16: [4, 2, 2]}[patch_size]
    for i, stride in enumerate(strides):
        kernel, bias = params[f"layer_{i}"]["kernel"], params[f"layer_{i}"]["bias"]
        kernel = kernel.reshape(stride, stride, x.shape[-1], -1)
        side = x.shape[1] // stride
        out = np.zeros((6, side, side, kernel.shape[-1]))
        for dy in range(stride):
            for dx in range(stride):
                out += x[:, dy::stride, dx::stride] @ kernel[dy, dx]
        x = out + bias
        if i < len(strides) - 1:
            norm = params[f"norm_{i}"]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * norm["scale"] + norm["bias"]
            x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(found, x.reshape(2, 3, 32), rtol=1e-3, atol=1e-4)


def test_a_hidden_pixel_does_not_pass_the_hmlp_stem():
    encoder = make_model().context_encoder.clone(stem="hmlp")
    x, index = images(1), jnp.asarray([[0, 5]])
    params = jax.jit(encoder.init)(jax.random.PRNGKey(0), x)
    apply = jax.jit(encoder.apply)
    before = apply(params, x, index)[0]
    assert np.any(apply(params, x.at[:, 0, 0].add(1.0), index)[0] != before)
    other = x.at[:, :PATCH, PATCH:].set(9.0)
    np.testing.assert_array_equal(apply(params, other, index)[0], before)
