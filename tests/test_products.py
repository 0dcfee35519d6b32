"""Matrix products: the fast formulations agree with the plain ones."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from hjepa_jax.method.losses import prediction_loss
from hjepa_jax.models import predictor, transformer
from hjepa_jax.models.matmul import Dense, Precision, product

LOW = Precision(jnp.bfloat16, jnp.float32)
RNG = np.random.default_rng(0)


def random(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


@pytest.mark.parametrize(("width", "features"), [(8, 7), (32, 32), (48, 32), (48, 7)])
@pytest.mark.parametrize("spec", ["nd,df->nf", "bnd,df->bnf", "bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"])
def test_operands_are_rounded_and_sums_are_float32_in_both_directions(spec, width, features):
    sizes = dict(zip("nbhqkdf", (5, 2, 3, 4, 64, width, features), strict=True))
    in_a, in_b, out = spec.replace("->", ",").split(",")
    a, b, grad = (random(*(sizes[axis] for axis in axes)) for axes in (in_a, in_b, out))

    @jax.jit
    def result_and_gradients(a, b, grad):
        result, pullback = jax.vjp(lambda a, b: product(spec, a, b, LOW), a, b)
        return result, *pullback(grad)

    expected = [
        np.einsum(spec, rounded(a), rounded(b)),
        np.einsum(f"{out},{in_b}->{in_a}", rounded(grad), rounded(b)),
        np.einsum(f"{in_a},{out}->{in_b}", rounded(a), rounded(grad)),
    ]
    for got, value in zip(result_and_gradients(a, b, grad), expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "width", "features"),
    [(64, 32, 48), (64, 48, 32), (16, 32, 32), (64, 16, 32), (64, 32, 16), (24, 32, 40)],
)
def test_the_gradient_of_a_weight_is_the_same_with_and_without_tiles(tokens, width, features):
    x, w, grad = random(tokens, width), random(width, features), random(tokens, features)

    @jax.jit
    def gradient(x, w, grad):
        return jax.vjp(lambda w: product("nd,df->nf", x, w, LOW), w)[1](grad)[0]

    expected = rounded(x).T @ rounded(grad)
    np.testing.assert_allclose(gradient(x, w, grad), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layer", [Dense(64, LOW), transformer.Attention(2, LOW)])
def test_no_compiled_product_of_the_backward_pass_sums_over_the_first_axes_of_both_operands(layer):
    """Such a product does not use the matrix units of a CPU. A plain transpose compiles to one."""
    x = random(4, 50, 64)
    params = layer.init(jax.random.PRNGKey(0), x)
    backward = jax.jit(jax.grad(lambda params, x: layer.apply(params, x).sum() ** 2, (0, 1)))
    program = backward.lower(params, x).compile().as_text()
    products = [line for line in program.splitlines() if " dot(" in line]
    assert products
    over_first = re.compile(r"lhs_contracting_dims=\{(0|2)\}.*rhs_contracting_dims=\{(0|2)\}")
    assert not [line for line in products if over_first.search(line)]


def test_results_may_be_rounded_and_gradients_keep_input_dtypes():
    precision = Precision(jnp.bfloat16, jnp.bfloat16)
    x, w = random(4, 8).astype(jnp.bfloat16), random(8, 3)
    result, pullback = jax.vjp(lambda x, w: product("nd,df->nf", x, w, precision), x, w)
    assert [result.dtype, *(g.dtype for g in pullback(result))] == ["bfloat16"] * 2 + ["float32"]


class PlainAttention(nn.Module):
    """Attention as in the paper: softmax, then the product."""

    num_heads: int
    precision: Precision
    out_scale: float
    cross: bool

    @nn.compact
    def __call__(self, x, *, memory, allowed, turns):
        assert turns is None
        (b, n, d), seen = x.shape, x if memory is None else jnp.concatenate([memory, x], axis=1)
        qkv = nn.Dense(3 * d, name="qkv")(seen).reshape(b, seen.shape[1], 3, self.num_heads, -1)
        query, key, value = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
        query = query[:, :, -n:]
        logits = query @ key.transpose(0, 1, 3, 2) / (d / self.num_heads) ** 0.5
        if allowed is not None:
            logits = jnp.where(allowed[:, None], logits, -1e9)
        out = (jax.nn.softmax(logits) @ value).transpose(0, 2, 1, 3).reshape(b, n, d)
        return nn.Dense(d, name="out")(out)


def test_loss_and_gradients_are_those_of_the_plain_formulation(monkeypatch):
    """Flax's Dense and a textbook attention give the same numbers up to float32 rounding."""
    model = predictor.Predictor(4, 2, 16, width=16, depth=2, num_heads=2)
    context, seen = random(3, 6, 16), (RNG.random((3, 6)) < 0.7) | (np.arange(6) == 0)
    valid = {0: jnp.asarray(RNG.random((3, 5)) < 0.7), 1: jnp.ones((3, 4), bool)}
    index = jnp.asarray(RNG.integers(16, size=(3, 5)), jnp.int32)
    asked = {"context_valid": jnp.asarray(seen), "target_index": index, "query_valid": valid}
    params = jax.jit(model.init)(jax.random.PRNGKey(0), context, **asked)
    params = jax.tree.map(lambda x: x + 0.1 * random(*x.shape), params)

    def loss_and_grads():
        def loss(params, context):
            levels = model.apply(params, context, **asked)
            terms = [prediction_loss(x, 0 * x + 1, valid[n], "mse") for n, x in levels.items()]
            return sum(terms)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, context)

    fast = loss_and_grads()
    plain_dense = lambda features, precision, scale=1.0, name=None: nn.Dense(features, name=name)
    monkeypatch.setattr(transformer, "Attention", PlainAttention)
    for module in (transformer, predictor):
        monkeypatch.setattr(module, "Dense", plain_dense)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    jax.tree.map(close, fast, loss_and_grads())
