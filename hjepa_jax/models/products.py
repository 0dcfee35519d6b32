"""Matrix products in a chosen precision, laid out as XLA's compilers are fastest with.

Three things about XLA on CPU (experiments/throughput) shape this file. The gradient of a weight
that multiplies [B, N, D] sums over two axes, for which both operands are transposed first: all
tokens of a batch are therefore one matrix. Products of bfloat16 numbers use the processor's matrix
units only where their results are float32, in the backward pass too; and only where they do not sum
over the first axes of both operands, as the gradient of a weight does.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

_DENSE = "nd,df->nf"  # all tokens by a weight
_TILE = 16


@dataclasses.dataclass(frozen=True)
class Precision:
    """How matrix products are computed.

    Attributes:
      operands: dtype that operands are rounded to; sums are float32.
      results: dtype of results, and so of activations.
    """

    operands: Any = jnp.float32
    results: Any = jnp.float32


def product(spec: str, a: Array, b: Array, precision: Precision) -> Array:
    """`jnp.einsum(spec, a, b)`; in the backward pass the gradient is an operand, rounded as such.

    Args:
      spec: in which each letter appears in two of "a,b->c" at least.
      a: first operand.
      b: second operand.
      precision: of operands and results.
    """
    if precision.operands == jnp.float32:
        return jnp.einsum(spec, a, b)
    return _rounded_product(spec, precision, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded_product(spec: str, precision: Precision, a: Array, b: Array) -> Array:
    return _forward(spec, precision, a, b)[0]


def _forward(spec: str, precision: Precision, a: Array, b: Array) -> tuple[Array, Any]:
    rounded = a.astype(precision.operands), b.astype(precision.operands)
    result = jnp.einsum(spec, *rounded, preferred_element_type=precision.results)
    return result, (rounded, jnp.empty(0, a.dtype), jnp.empty(0, b.dtype))


def _backward(spec: str, precision: Precision, residuals: Any, grad: Array) -> tuple[Array, Array]:
    (a, b), like_a, like_b = residuals
    (in_a, in_b), out = spec.split("->")[0].split(","), spec.split("->")[1]
    grad = grad.astype(precision.operands)
    grad_a = jnp.einsum(f"{out},{in_b}->{in_a}", grad, b, preferred_element_type=like_a.dtype)
    if spec == _DENSE and precision.results == jnp.float32 and _has_tiles(*a.shape, *b.shape):
        grad_b = _weight_gradient(a, grad).astype(like_b.dtype)
    else:
        grad_b = jnp.einsum(f"{in_a},{out}->{in_b}", a, grad, preferred_element_type=like_b.dtype)
    return grad_a, grad_b


_rounded_product.defvjp(_forward, _backward)


def _has_tiles(*sizes: int) -> bool:
    """Whether arrays of such sizes have several tiles along each axis, and nothing beside them.

    Of arrays that are split over devices the whole size counts: the parts may have to be exchanged.
    """
    return all(size % _TILE == 0 and size > _TILE for size in sizes)


def _weight_gradient(x: Float[Array, "N D"], grad: Float[Array, "N F"]) -> Float[Array, "D F"]:
    """x^T grad in float32, as a product over the second axis of a transposed copy of the narrower.

    The copy costs a tenth of the product and makes it three to five times as fast.
    """
    if x.shape[1] <= grad.shape[1]:
        return jnp.dot(_transposed_copy(x), grad, preferred_element_type=jnp.float32)
    return _transposed_copy(jnp.dot(_transposed_copy(grad), x, preferred_element_type=jnp.float32))


def _transposed_copy(x: Float[Array, "N D"]) -> Float[Array, "D N"]:
    """x^T, tile by tile: a plain transpose would be folded back into the product."""
    n, d = x.shape
    tiles = x.reshape(n // _TILE, _TILE, d // _TILE, _TILE)
    return tiles.transpose(2, 3, 0, 1).reshape(d, n)


class Dense(nn.Module):
    """x W + b over the last axis, of all tokens at once; Xavier-uniform W times `scale`.

    Attributes:
      features: width of the result, F.
      precision: of the product; parameters are float32.
      scale: of the kernel at initialisation.
    """

    features: int
    precision: Precision = Precision()
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        kernel_init = nn.initializers.variance_scaling(self.scale**2, "fan_avg", "uniform")
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        y = product(_DENSE, x.reshape(-1, x.shape[-1]), kernel, self.precision)
        y = y + bias.astype(y.dtype)[None]
        return y.reshape(*x.shape[:-1], self.features)
