import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hjepa_jax.config import base_config, build
from hjepa_jax.method.muon import orthogonalize, scale_by_muon
from hjepa_jax.method.optimizer import (
    decay_mask,
    interpolation_schedule,
    make_optimizer,
    muon_mask,
    warmup_cosine_schedule,
)
from hjepa_jax.models.matmul import Precision


def rates(steps, peak=1.0, **kwargs):
    fn = warmup_cosine_schedule(peak, **{"warmup_steps": 10, "num_steps": 110, **kwargs})
    return [float(rate) for rate in jax.vmap(fn)(jnp.asarray(steps))]


QUARTER = 0.2 + 0.8 * (2 + 2**0.5) / 4  # of a cosine from 1 to 0.2; a linear decay gives 0.8


@pytest.mark.parametrize(
    ("kwargs", "by_step"),
    [
        ({"end": 0.2}, {1: 0.1, 5: 0.5, 10: 1, 35: QUARTER, 60: 0.6, 110: 0.2, 10_000: 0.2}),
        ({"end": 0.2, "decay_steps": 40}, {5: 0.5, 10: 1, 70: 1, 90: 0.6, 110: 0.2}),
        ({"decay_steps": 0}, {5: 0.5, 10: 1, 110: 1}),
        # A run may end during its warm-up, or exactly at its end.
        ({"peak": 1e-4, "warmup_steps": 1562, "num_steps": 300}, {250: 1.6005e-05}),
        ({"num_steps": 10}, {9: 0.9, 10: 1}),
    ],
)
def test_a_linear_warmup_a_plateau_and_a_cosine_that_ends_at_the_end(kwargs, by_step):
    np.testing.assert_allclose(rates([*by_step], **kwargs), [*by_step.values()], rtol=1e-4)


def test_the_decay_is_cut_to_the_steps_after_the_warmup():
    steps = [5, 10, 35, 110]
    assert rates(steps) == rates(steps, decay_steps=100) == rates(steps, decay_steps=500)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.9, 0.9, 0.9, 0.9]),
        ("linear", [0.9, 0.925, 0.95, 1.0]),
        ("cosine", [0.9, 0.914645, 0.95, 1.0]),
    ],
)
def test_interpolation_goes_from_start_to_end(kind, expected):
    fn = interpolation_schedule(0.9, 1.0, kind=kind, num_steps=100)
    np.testing.assert_allclose([fn(s) for s in (0, 25, 50, 100)], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="step"):
        interpolation_schedule(0.9, 1.0, kind="step", num_steps=10)


def test_only_kernels_decay():
    """Uses the real model with all optional parts, so that no new parameter name is missed."""
    config = base_config()
    config.model.width, config.model.depth, config.model.num_heads = 16, 2, 2
    config.model.predictor_width, config.model.predictor_depth = 8, 1
    config.model.predictor_num_heads, config.model.predictor_mode = 2, "cross"
    config.model.num_registers, config.model.layer_scale = 2, 0.1
    config.model.pyramid = "add"
    create = build.build_create_state(config, build.build_model(config), optax.identity())
    params = jax.eval_shape(create).params
    decayed, undecayed = set(), set()
    for path, on in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        (decayed if on else undecayed).add(path[-1].key)
    assert decayed == {"kernel"}
    assert {"bias", "scale", "embedding", "mixing"} <= undecayed
    assert {"mask_token", "level_tokens", "summary_tokens", "register_tokens"} <= undecayed


def test_adamw_against_its_definition():
    """Two updates of scalar weights match the formulas of the paper, schedules included."""
    learning_rates, decays = [0.0, 0.1, 0.2], [0.0, 0.5, 0.3]
    tx = make_optimizer(
        learning_rate_fn=lambda s: jnp.asarray(learning_rates)[s],
        weight_decay_fn=lambda s: jnp.asarray(decays)[s],
    )
    update, m, v = jax.jit(tx.update), 0.0, 0.0
    expected = {"kernel": 1.0, "bias": 1.0}
    params = jax.tree.map(lambda x: jnp.array([x]), expected)
    state = tx.init(params)
    for s, g in enumerate([0.5, -0.2], start=1):
        updates, state = update({name: jnp.array([g]) for name in params}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        adam = (m / (1 - 0.9**s)) / (np.sqrt(v / (1 - 0.95**s)) + 1e-8)
        for name in expected:
            decay = decays[s] * expected[name] if name == "kernel" else 0.0
            expected[name] -= learning_rates[s] * (adam + decay)
    for name, value in expected.items():
        np.testing.assert_allclose(params[name][0], value, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    """Adam hides the scale of one gradient, but an unclipped huge one distorts later updates."""
    rates = {"learning_rate_fn": lambda s: 1.0 * s, "weight_decay_fn": lambda s: 0.0 * s}
    tx = make_optimizer(clip_norm=1.0, **rates)
    params, update, results = {"kernel": jnp.zeros(2)}, jax.jit(tx.update), []
    for scale in (1.0, 1e6):
        state = tx.init(params)
        for g in (scale * jnp.array([3.0, 4.0]), jnp.array([0.1, -0.1])):
            updates, state = update({"kernel": g}, state, params)
        results.append(updates["kernel"])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def test_orthogonalize_keeps_singular_vectors_and_equalizes_values():
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=(3, 8, 20)), full_matrices=False)
    sizes = np.array([[1e-3], [1.0], [1e4]]) * np.geomspace(1, 0.003, 8)
    matrices = u * sizes[:, None] @ v
    found = np.asarray(jax.jit(orthogonalize)(jnp.asarray(matrices, jnp.float32)))
    # In the singular basis of the matrix the result is diagonal, with values around 1.
    inner = u.transpose(0, 2, 1) @ found @ v.transpose(0, 2, 1)
    diagonal = np.einsum("sii->si", inner)
    assert 0.65 < diagonal.min() < diagonal.max() < 1.25
    np.testing.assert_allclose(inner, diagonal[:, None] * np.eye(8), atol=1e-3)


def test_muon_multiplies_in_the_dtype_of_the_model(tiny_config):
    tiny_config.optim.kind = "muon"
    schedules = build.build_schedules(tiny_config, 40)
    params = {"layer": {"kernel": jnp.ones((16, 48))}}
    for dtype, letters in (("float32", "f32"), ("bfloat16", "bf16")):
        tiny_config.model.dtype = dtype
        tx = build.build_optimizer(tiny_config, schedules)
        program = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
        operands = re.findall(r"dot_general.* : \(tensor<[^>]*x(\w+)>", program)
        assert operands == 15 * [letters]  # three products in each of five iterations


def test_muon_with_bfloat16_products_is_close_to_float32():
    """The products round as on CPUs or as on GPUs. Three of the five matrices form one stack."""
    rng, shapes = np.random.default_rng(0), [(16, 48), (16, 48), (48, 16), (48, 48), (5, 3)]
    params = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    exact, found, as_on_gpus = (
        jax.jit(tx.update)(params, tx.init(params))[0]
        for tx in (
            scale_by_muon(),
            scale_by_muon(precision=Precision(jnp.bfloat16, jnp.float32)),
            scale_by_muon(precision=Precision(jnp.bfloat16, jnp.bfloat16)),
        )
    )
    for one, *others in zip(exact, found, as_on_gpus, strict=True):
        for other in others:
            assert other.dtype == jnp.float32
            assert 0 < np.linalg.norm(one - other) < 0.1 * np.linalg.norm(one)
            sizes = np.linalg.svd(other, compute_uv=False) / (0.2 * max(one.shape) ** 0.5)
            assert sizes.max() < 1.25
            assert sizes.min() > 0.6 or one.shape == (48, 48)  # square: its smallest is nearly 0


def test_orthogonalizing_zeros_gives_zeros():
    assert np.array_equal(orthogonalize(jnp.zeros((1, 2, 3))), np.zeros((1, 2, 3)))


def test_muon_against_its_definition():
    """Two updates of tall, wide and square matrices match an SVD."""
    shapes = {"a": (6, 4), "b": (6, 4), "c": (3, 3), "d": (4, 6)}
    rng = np.random.default_rng(1)
    tx = scale_by_muon(momentum=0.9)
    state = tx.init({name: jnp.zeros(shape) for name, shape in shapes.items()})
    momentum = dict.fromkeys(shapes, 0.0)
    update = jax.jit(tx.update)
    for _ in range(2):
        grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        updates, state = update(jax.tree.map(jnp.float32, grads), state)
        for name, shape in shapes.items():
            momentum[name] = 0.9 * momentum[name] + grads[name]
            u, _, v = np.linalg.svd(grads[name] + 0.9 * momentum[name], full_matrices=False)
            inner = u.T @ np.asarray(updates[name]) @ v.T / (0.2 * max(shape) ** 0.5)
            np.testing.assert_allclose(inner, np.eye(min(shape)), atol=0.35)


def test_muon_updates_are_slightly_smaller_than_orthogonal_ones():
    rng, tx = np.random.default_rng(0), scale_by_muon()
    shapes = (64, 64), (48, 96), (96, 384)
    gradients = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    for update in jax.jit(tx.update)(gradients, tx.init(gradients))[0]:
        assert 0.16 < np.sqrt(np.mean(np.square(update))) < 0.2


def test_muon_moves_the_hidden_matrices_and_adam_the_rest(tiny_config):
    """The updates by Adam are the same as without Muon. Weight decay is the same for both."""
    tiny_config.loss.agreement_weight = 1.0
    model = build.build_model(tiny_config)
    shapes = jax.eval_shape(build.build_create_state(tiny_config, model, optax.identity())).params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), np.float32), shapes)
    by_muon = {
        jax.tree_util.keystr(path)
        for path, on in jax.tree_util.tree_leaves_with_path(muon_mask(params))
        if on
    }
    assert {
        "['context_encoder']['block_0']['attention']['qkv']['kernel']",
        "['predictor']['blocks_0']['mlp_in']['kernel']",
    } <= by_muon
    assert all(path.endswith("['kernel']") for path in by_muon)
    assert not any("patch_embedding" in path for path in by_muon)

    options = {"learning_rate_fn": lambda s: 0.1 * s, "weight_decay_fn": lambda s: 0.5}
    grads = jax.tree.map(lambda x: np.cos(3 * x), params)
    zeros = jax.tree.map(np.zeros_like, params)
    updates = {}
    for name, momentum in (("adam", None), ("muon", 0.95)):
        tx = make_optimizer(**options, muon_momentum=momentum)
        update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
        updates[name], _ = update(grads, state, params)
        # With zero gradients the update is the weight decay.
        decay, _ = update(zeros, state, params)
        expected = jax.tree.map(lambda on, x: -0.1 * 0.5 * x * on, decay_mask(params), params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), decay, expected)
    for path, one in jax.tree_util.tree_leaves_with_path(updates["adam"]):
        other = updates["muon"]
        for key in path:
            other = other[key.key]
        same = jax.tree_util.keystr(path) not in by_muon
        assert np.allclose(one, other, rtol=1e-5, atol=1e-7) == same, path
