"""Matrix products in a chosen precision, in the layout that XLA compiles to the fastest code.

Three facts about XLA on CPU (experiments/throughput) shape this file:

* The gradient of a weight that multiplies [B, N, D] sums over two axes, and XLA transposes both
  operands first. So all tokens of a batch form one matrix here.
* bfloat16 products use the processor's matrix units only if the results are float32, in the
  backward pass too.
* A sum over the first axes of both operands does not use the matrix units. The gradients of
  weights, keys and values are such sums, so one operand is transposed here (`_product_over_first`).
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
      results: dtype of the results, and therefore of activations.
    """

    operands: Any = jnp.float32
    results: Any = jnp.float32


FLOAT32 = Precision()


def product(spec: str, a: Array, b: Array, precision: Precision) -> Array:
    """`jnp.einsum(spec, a, b)`; the backward pass rounds the gradient like an operand.

    Args:
      spec: an einsum "a,b->c" in which each letter appears in at least two of the three terms.
      a: first operand.
      b: second operand.
      precision: precision of operands and results.
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
    # True if the gradient of b sums over the second to last axis of a, which b does not have.
    by_rows = in_a[:-1] == out[:-1] and set(in_a) - set(in_b) == {in_a[-2]}
    tiles = precision.results == jnp.float32 and _has_tiles(min(a.shape[-1], grad.shape[-1]))
    if by_rows and tiles:
        pair = (a, grad) if in_b[-1] == out[-1] else (grad, a)
        grad_b = _product_over_first(*pair).astype(like_b.dtype)
    else:
        grad_b = jnp.einsum(f"{in_a},{out}->{in_b}", a, grad, preferred_element_type=like_b.dtype)
    return grad_a, grad_b


_rounded_product.defvjp(_forward, _backward)


def _has_tiles(size: int) -> bool:
    """Whether an axis of this size consists of two or more whole tiles."""
    return size % _TILE == 0 and size > _TILE


def _product_over_first(x: Float[Array, "*B N D"], y: Float[Array, "*B N F"]) -> Array:
    """x^T y in float32, [*B, D, F], from a transposed copy of the narrower operand.

    The copy costs a tenth of the product and makes it three to five times as fast.
    """
    if x.shape[-1] <= y.shape[-1]:
        return jnp.matmul(_transposed_copy(x), y, preferred_element_type=jnp.float32)
    turned = jnp.matmul(_transposed_copy(y), x, preferred_element_type=jnp.float32)
    return _transposed_copy(turned)


def _transposed_copy(x: Float[Array, "*B N D"]) -> Float[Array, "*B D N"]:
    """x^T, in tiles if possible, because XLA would merge a plain transpose into the product.

    The barrier keeps XLA from merging an earlier reshape of x into the copy. The index arithmetic
    of the reshape would make the copy ten times as slow.
    """
    x = jax.lax.optimization_barrier(x)
    *batch, n, d = x.shape
    rows, cols = (_TILE if _has_tiles(size) else 1 for size in (n, d))
    tiles = x.reshape(*batch, n // rows, rows, d // cols, cols)
    order = (*range(len(batch)), *(len(batch) + i for i in (2, 3, 0, 1)))
    return tiles.transpose(order).reshape(*batch, d, n)


class Dense(nn.Module):
    """x W + b over the last axis, for all tokens at once; Xavier-uniform W times `scale`.

    Attributes:
      features: width of the result, F.
      precision: precision of the product; parameters are float32.
      scale: factor of the kernel at initialisation.
      use_bias: whether there is a bias b.
    """

    features: int
    precision: Precision = Precision()
    scale: float = 1.0
    use_bias: bool = True

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        (y,) = self.parts(x, 1)
        return y

    @nn.compact
    def parts(self, x: Float[Array, "*B D"], count: int) -> list[Float[Array, "*B F_count"]]:
        """The result in `count` equal parts, one product each, so that no large array is split."""
        kernel_init = nn.initializers.variance_scaling(self.scale**2, "fan_avg", "uniform")
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        rows, sizes = x.reshape(-1, x.shape[-1]), (self.features // count,) * count
        found = []
        kernels, biases = jax.lax.split(kernel, sizes, axis=1), [None] * count
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            biases = jax.lax.split(bias, sizes)
        for k, b in zip(kernels, biases, strict=True):
            y = product(_DENSE, rows, k, self.precision)
            y = y if b is None else y + b.astype(y.dtype)[None]
            found.append(y.reshape(*x.shape[:-1], -1))
        return found
