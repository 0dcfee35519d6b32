"""The judge reports programs that a plugin is known to refuse, and accepts others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.mlir import make_ir_context
from jaxlib.mlir import ir

from tests.metal.judge import refusals

X = jnp.ones((2, 4, 4))
IMAGE = jnp.ones((1, 8, 8, 3))
KERNEL = jnp.ones((2, 2, 3, 8))
INDEX = np.zeros((2, 3), np.int32)


def conv(image, kernel, **kwargs):
    return jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
    )


def window_sum(x):
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2), (1, 2, 2), "VALID")


def window_max(x, **kwargs):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2), (1, 2, 2), "VALID", **kwargs)


def attention_gradient(x):
    """The gradient in jax-ml/jax issue 20114: a batched product over two axes."""
    return jnp.einsum("bij,bkij->bk", x, jnp.stack([x, x], axis=1))


def with_callback(x):
    jax.debug.print("{}", x[0, 0, 0])
    return x


class Text:
    """A program as MLIR, for forms that JAX itself never generates."""

    def __init__(self, results: str, body: str):
        self._text = f"""
            module {{ func.func public @main(%x: tensor<4x3xf32>, %i: tensor<2x1xi32>,
                %u: tensor<2x3xf32>) -> ({results}) {{ {body} }} }}"""

    def lower(self, **_):
        return self

    def compiler_ir(self, _):
        return ir.Module.parse(self._text, make_ir_context())


SCATTER_OF_TWO = Text(
    "tensor<4x3xf32>, tensor<4x3xf32>",
    """%0:2 = "stablehlo.scatter"(%x, %x, %i, %u, %u) <{scatter_dimension_numbers =
        #stablehlo.scatter<update_window_dims = [1], inserted_window_dims = [0],
        scatter_dims_to_operand_dims = [0], index_vector_dim = 1>}> ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>, %c: tensor<f32>, %d: tensor<f32>):
            stablehlo.return %c, %d : tensor<f32>, tensor<f32>
        }) : (tensor<4x3xf32>, tensor<4x3xf32>, tensor<2x1xi32>, tensor<2x3xf32>,
        tensor<2x3xf32>) -> (tensor<4x3xf32>, tensor<4x3xf32>)
        return %0#0, %0#1 : tensor<4x3xf32>, tensor<4x3xf32>""",
)
GATHER_BY_COLUMNS = Text(
    "tensor<1x3xf32>",
    """%0 = "stablehlo.gather"(%x, %i) <{dimension_numbers = #stablehlo.gather<offset_dims = [],
        collapsed_slice_dims = [0, 1], start_index_map = [0, 1], index_vector_dim = 0>,
        slice_sizes = array<i64: 1, 1>}> : (tensor<4x3xf32>, tensor<2x1xi32>) -> tensor<1xf32>
        %1 = stablehlo.broadcast_in_dim %0, dims = [0] : (tensor<1xf32>) -> tensor<1x3xf32>
        return %1 : tensor<1x3xf32>""",
)


REFUSED = {
    # name: (function, arguments, plugin, words in the refusal)
    "complex": (lambda x: jax.lax.complex(x, x), (X,), "METAL", "complex<f32>"),
    "fft": (lambda x: jnp.abs(jnp.fft.fft(x)), (X,), "METAL", "stablehlo.fft"),
    "popcnt": (lambda x: jax.lax.population_count(x), (INDEX,), "METAL", "stablehlo.popcnt"),
    "clz": (lambda x: jax.lax.clz(x), (INDEX,), "METAL", "count_leading_zeros"),
    "qr": (lambda x: jnp.linalg.qr(x), (X,), "METAL", "stablehlo.custom_call of "),
    "product over two axes": (attention_gradient, (X,), "METAL", "more than one contracting"),
    "integer product": (lambda i: i @ i.T, (INDEX,), "METAL", "dot_general: of integers"),
    "windowed sum": (window_sum, (X,), "METAL", "reduce_window: by stablehlo.add"),
    "dilated window": (
        lambda x: window_max(x, window_dilation=(1, 2, 2)), (X,), "METAL", "reduce_window: dilated",
    ),
    "scatter with another combiner": (
        lambda x: x.at[INDEX[0]].apply(lambda y: y * 2 + 1), (X,), "METAL", "scatter: combines by",
    ),
    "batch groups": (
        lambda k: conv(jnp.ones((2, 8, 8, 3)), k, batch_group_count=2), (KERNEL,), "METAL",
        "convolution: batch groups",
    ),
    "integer convolution": (
        lambda k: conv(IMAGE.astype(jnp.int32), k.astype(jnp.int32)), (KERNEL,), "METAL",
        "convolution: of integers",
    ),
    "callback": (with_callback, (X,), "METAL", "does not lower"),
    "callback on mps": (with_callback, (X,), "mps", "does not lower"),
}  # fmt: skip

TAKEN = {
    "unbatched product over two axes": (lambda x: jnp.tensordot(x, x, 2), (X[0],)),
    "windowed maximum": (window_max, (X,)),
    "convolution": (conv, (IMAGE, KERNEL)),
    "gather": (lambda x: x[INDEX], (X,)),
    "gather for each row": (
        lambda x: jnp.take_along_axis(x, INDEX[:, :, None], axis=1), (X,),
    ),
    "scatter": (lambda x: x.at[INDEX[0]].add(1.0), (X,)),
    "erf": (jax.lax.erf, (X,)),
    "random numbers": (lambda k: jax.random.normal(k, (8,)), (jax.random.PRNGKey(0),)),
    "loop": (lambda x: jax.lax.fori_loop(0, 4, lambda _, y: y + 1, x), (X,)),
    "bytes": (lambda x: x.astype(jnp.float32) / 255, (np.zeros((2, 2), np.uint8),)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_a_plugin_refuses_are_refused(name):
    function, arguments, platform, words = REFUSED[name]
    found = refusals(jax.jit(function).trace(*arguments), platform)
    assert any(words in line for line in found), found


@pytest.mark.parametrize("platform", ["METAL", "mps"])
@pytest.mark.parametrize("name", TAKEN)
def test_programs_that_both_plugins_support_are_accepted(name, platform):
    function, arguments = TAKEN[name]
    assert refusals(jax.jit(function).trace(*arguments), platform) == []


def test_unsupported_gathers_and_scatters_are_refused():
    words = "stablehlo.gather: index vectors not in the last axis"
    assert words in refusals(GATHER_BY_COLUMNS, "METAL")
    assert refusals(GATHER_BY_COLUMNS, "mps") == []
    for platform in ("METAL", "mps"):
        assert "stablehlo.scatter: of several arrays at once" in refusals(SCATTER_OF_TWO, platform)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def test_float64_is_refused_and_uint64_allowed_inside_programs(x64):
    for platform in ("METAL", "mps"):
        found = refusals(jax.jit(lambda x: x * x).trace(np.ones(2)), platform)
        assert found == ["argument or result of f64", "stablehlo.multiply of f64"]
    outside = jax.jit(lambda x: x + x).trace(np.ones(2, np.uint64))
    inside = jax.jit(lambda x: x.astype(np.uint64).astype(np.uint32)).trace(np.ones(2, np.uint32))
    assert refusals(outside, "METAL") == ["argument or result of ui64"]
    assert refusals(inside, "METAL") == refusals(outside, "mps") == []
