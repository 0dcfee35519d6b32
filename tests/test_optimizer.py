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


def test_warmup_is_linear_and_the_cosine_ends_at_the_end():
    fn = warmup_cosine_schedule(1.0, warmup_steps=10, num_steps=110, end=0.2)
    assert [round(float(fn(s)), 6) for s in (1, 5, 10)] == [0.1, 0.5, 1.0]
    np.testing.assert_allclose(fn(35), 0.2 + 0.8 * (2 + 2**0.5) / 4, rtol=1e-6)  # linear: 0.8
    np.testing.assert_allclose(fn(60), 0.6, rtol=1e-6)
    np.testing.assert_allclose(fn(110), 0.2, rtol=1e-6)
    np.testing.assert_allclose(fn(10_000), 0.2, rtol=1e-6)


def test_the_rate_may_be_kept_until_the_decay():
    fn = warmup_cosine_schedule(1.0, warmup_steps=10, num_steps=110, end=0.2, decay_steps=40)
    assert [round(float(fn(s)), 6) for s in (5, 10, 70, 90, 110)] == [0.5, 1.0, 1.0, 0.6, 0.2]
    kept = warmup_cosine_schedule(1.0, warmup_steps=10, num_steps=110, decay_steps=0)
    assert [float(kept(s)) for s in (5, 10, 110)] == [0.5, 1.0, 1.0]
    for steps in (100, 500):  # all after the warm-up, at most
        longest = warmup_cosine_schedule(1.0, warmup_steps=10, num_steps=110, decay_steps=steps)
        whole = warmup_cosine_schedule(1.0, warmup_steps=10, num_steps=110)
        assert [float(longest(s)) for s in (5, 10, 35, 110)] == [
            float(whole(s)) for s in (5, 10, 35, 110)
        ]


def test_a_run_may_end_within_its_warmup():
    fn = warmup_cosine_schedule(1e-4, warmup_steps=1562, num_steps=300)
    np.testing.assert_allclose(fn(250), 1.6005e-05, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "quarter", "middle"),
    [("constant", 0.9, 0.9), ("linear", 0.925, 0.95), ("cosine", 0.914645, 0.95)],
)
def test_interpolation_goes_from_start_to_end(kind, quarter, middle):
    fn = interpolation_schedule(0.9, 1.0, kind=kind, num_steps=100)
    np.testing.assert_allclose(fn(25), quarter, rtol=1e-6)
    np.testing.assert_allclose(fn(0), 0.9, rtol=1e-6)
    np.testing.assert_allclose(fn(50), middle, rtol=1e-6)
    np.testing.assert_allclose(fn(100), 0.9 if kind == "constant" else 1.0, rtol=1e-6)


def test_interpolation_refuses_another_kind():
    with pytest.raises(ValueError, match="step"):
        interpolation_schedule(0.9, 1.0, kind="step", num_steps=10)


def test_only_kernels_decay():
    """Of the real model with every part that it may have, so that no new name slips by."""
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
    """Two updates of scalar weights by the formulas of the paper, schedules included."""
    learning_rates, decays = [0.0, 0.1, 0.2], [0.0, 0.5, 0.3]
    tx = make_optimizer(
        learning_rate_fn=lambda s: jnp.asarray(learning_rates)[s],
        weight_decay_fn=lambda s: jnp.asarray(decays)[s],
        b1=0.9,
        b2=0.95,
    )
    params = {"kernel": jnp.array([1.0]), "bias": jnp.array([1.0])}
    state = tx.init(params)
    grads = [{"kernel": 0.5, "bias": 0.5}, {"kernel": -0.2, "bias": -0.2}]
    expected = {"kernel": 1.0, "bias": 1.0}
    m = v = 0.0
    for s, grad in enumerate(grads, start=1):
        updates, state = tx.update({k: jnp.array([g]) for k, g in grad.items()}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        g = grad["kernel"]
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        adam = (m / (1 - 0.9**s)) / (np.sqrt(v / (1 - 0.95**s)) + 1e-8)
        for name in expected:
            decay = decays[s] * expected[name] if name == "kernel" else 0.0
            expected[name] -= learning_rates[s] * (adam + decay)
    for name, value in expected.items():
        np.testing.assert_allclose(params[name][0], value, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    """Adam hides the scale of a gradient, not its history: a huge first one must not linger."""
    kwargs = {
        "learning_rate_fn": lambda s: jnp.float32(1.0),
        "weight_decay_fn": lambda s: jnp.float32(0.0),
    }
    results = []
    for scale in (1.0, 1e6):
        tx = make_optimizer(clip_norm=1.0, **kwargs)
        params = {"kernel": jnp.zeros(2)}
        state = tx.init(params)
        for g in (scale * jnp.array([3.0, 4.0]), jnp.array([0.1, -0.1])):
            updates, state = tx.update({"kernel": g}, state, params)
        results.append(updates["kernel"])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def test_orthogonalized_matrices_keep_their_directions_and_lose_their_sizes():
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=(3, 8, 20)), full_matrices=False)
    sizes = np.array([[1e-3], [1.0], [1e4]]) * np.geomspace(1, 0.003, 8)
    matrices = u * sizes[:, None] @ v
    found = np.asarray(orthogonalize(jnp.asarray(matrices, jnp.float32)))
    # In the basis of the matrix itself the result is diagonal, with numbers around 1 there.
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
        assert operands == 15 * [letters]  # three products, five times


def test_rounded_products_orthogonalize_as_well():
    matrices = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 48)), jnp.float32)
    rounded = Precision(operands=jnp.bfloat16, results=jnp.bfloat16)
    exact, found = orthogonalize(matrices), orthogonalize(matrices, rounded)
    assert found.dtype == jnp.float32
    sizes = np.linalg.svd(found, compute_uv=False)
    assert 0.65 < sizes.min() < sizes.max() < 1.25
    assert 0 < np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (48, 48), (5, 3)])
@pytest.mark.parametrize("number", [1, 2])
def test_muon_runs_with_rounded_products_whatever_the_shape(shape, number):
    rounded = Precision(operands=jnp.bfloat16, results=jnp.float32)  # as on CPU
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(number)]
    exact, found = (
        jax.jit(tx.update)(params, tx.init(params))[0]
        for tx in (scale_by_muon(), scale_by_muon(precision=rounded))
    )
    for one, other in zip(exact, found, strict=True):
        assert np.linalg.norm(one - other) < 0.1 * np.linalg.norm(one)


def test_orthogonalizing_nothing_gives_nothing():
    assert np.array_equal(orthogonalize(jnp.zeros((1, 2, 3))), np.zeros((1, 2, 3)))


def test_muon_against_its_definition():
    """Two updates of matrices of two shapes, one of them higher than wide, by an SVD."""
    shapes = {"a": (6, 4), "b": (6, 4), "c": (3, 3), "d": (4, 6)}
    rng = np.random.default_rng(1)
    tx = scale_by_muon(momentum=0.9)
    state = tx.init({name: jnp.zeros(shape) for name, shape in shapes.items()})
    momentum = dict.fromkeys(shapes, 0.0)
    for _ in range(2):
        grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        updates, state = tx.update(jax.tree.map(jnp.float32, grads), state)
        for name, shape in shapes.items():
            momentum[name] = 0.9 * momentum[name] + grads[name]
            u, _, v = np.linalg.svd(grads[name] + 0.9 * momentum[name], full_matrices=False)
            inner = u.T @ np.asarray(updates[name]) @ v.T / (0.2 * max(shape) ** 0.5)
            np.testing.assert_allclose(inner, np.eye(min(shape)), atol=0.35)


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 384)])
def test_updates_of_muon_are_a_little_smaller_than_those_of_orthogonal_matrices(shape):
    tx, gradient = (
        scale_by_muon(),
        jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32),
    )
    update, _ = tx.update(gradient, tx.init(gradient))
    assert 0.16 < jnp.sqrt(jnp.mean(update**2)) < 0.2


def test_muon_moves_the_hidden_matrices_and_adam_the_rest(tiny_config):
    """And where Adam moves, it does so as without Muon; the decay is the same for both."""
    tiny_config.loss.agreement_weight = 1.0
    model = build.build_model(tiny_config)
    params = jax.jit(build.build_create_state(tiny_config, model, optax.identity()))().params
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
    params = jax.device_get(params)
    grads = jax.tree.map(
        lambda x: np.cos(np.arange(x.size).reshape(x.shape) ** 1.5).astype(np.float32), params
    )
    zeros = jax.tree.map(np.zeros_like, params)
    updates = {}
    for name, momentum in (("adam", None), ("muon", 0.95)):
        tx = make_optimizer(**options, muon_momentum=momentum)
        update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
        updates[name], _ = update(grads, state, params)
        # Without a gradient what is left is the decay.
        decay, _ = update(zeros, state, params)
        expected = jax.tree.map(lambda on, x: -0.1 * 0.5 * x * on, decay_mask(params), params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), decay, expected)
    for path, one in jax.tree_util.tree_leaves_with_path(updates["adam"]):
        other = updates["muon"]
        for key in path:
            other = other[key.key]
        same = jax.tree_util.keystr(path) not in by_muon
        assert np.allclose(one, other, rtol=1e-5, atol=1e-7) == same, path
