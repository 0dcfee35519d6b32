"""Muon: weight matrices move along their orthogonalized momentum.

Adam treats each weight by itself, Muon each matrix as a whole. A momentum U S V^T becomes the
update U V^T: a direction that many examples share moves a layer no further than a rare one. The
optax versions that we support scale updates differently, and one loops on the device, which Apple's
plugins do badly. Hence this file. Query, key and value are orthogonalized as one matrix. Each by
itself made no difference after an epoch (experiments/recipes).

References:
  Jordan 2024, "Muon: an optimizer for hidden layers in neural networks" (momentum, iteration);
  Liu et al. 2025, arXiv 2502.16982, section 2.2 (updates as large as in AdamW).
"""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hjepa_jax.models.matmul import FLOAT32, Precision, product

# Coefficients of the quintic (Jordan 2024). It is steep at 0, so that five iterations suffice for
# all but tiny singular values. Values around 1 stay between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_UPDATE_RMS = 0.2  # for orthogonal matrices; as usual for AdamW (Liu et al. 2025)


class MuonState(NamedTuple):
    """The momentum, of the shape of the parameters: the gradient, after the first update."""

    momentum: Any


def scale_by_muon(
    momentum: float = 0.95, precision: Precision = FLOAT32
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized, of matrices [m, n].

    The iteration leaves singular values, most of them between 0.7 and 1.2. The root mean square of
    an update is `_UPDATE_RMS` times their root mean square: 0.16 to 0.2 in all cases tried.

    Weight decay and a learning rate follow, at the values for AdamW.

    Args:
      momentum: decay rate of the momentum, in [0, 1).
      precision: of the products that orthogonalize.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        new = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: momentum * m + g, new, updates)
        return _by_shape(ahead, precision), MuonState(new)

    return optax.GradientTransformation(init, update)


def orthogonalize(
    matrices: Float[Array, "S m n"], precision: Precision = FLOAT32
) -> Float[Array, "S m n"]:
    """About U V^T of each matrix U S V^T, by Newton-Schulz iterations; at least as wide as high.

    X <- a X + (b X X^T + c (X X^T)^2) X, from X of norm 1. Singular values below a few thousandths
    of the norm stay smaller than 1; a matrix of zeros stays zero. The iteration mends its own
    errors, so that products of bfloat16 numbers do (experiments/throughput).
    """
    a, b, c = _COEFFICIENTS
    norm = jnp.sqrt(jnp.sum(matrices**2, axis=(1, 2), keepdims=True))
    x = matrices / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
    for _ in range(_ITERATIONS):
        gram = product("smk,snk->smn", x, x, precision)
        square = product("smk,skn->smn", gram, gram, precision)
        x = a * x + product("smk,skn->smn", b * gram + c * square, x, precision)
    return x


def _by_shape(tree: Any, precision: Precision) -> Any:
    """All matrices of a tree, orthogonalized and scaled; equal shapes together.

    A network has many of few shapes: few large products instead of many small ones.
    """
    leaves, structure = jax.tree.flatten(tree)
    groups = collections.defaultdict(list)
    for i, leaf in enumerate(leaves):
        groups[tuple(sorted(leaf.shape))].append(i)
    for (_, width), members in groups.items():
        turned = [leaves[i].shape[0] > leaves[i].shape[1] for i in members]
        stack = [leaves[i].T if t else leaves[i] for i, t in zip(members, turned, strict=True)]
        # XLA would fold the turn of a lone matrix into its products, and has none such for CPUs.
        matrices = jax.lax.optimization_barrier(jnp.stack(stack))
        found = _UPDATE_RMS * width**0.5 * orthogonalize(matrices, precision)
        for k, (i, t) in enumerate(zip(members, turned, strict=True)):
            leaves[i] = found[k].T if t else found[k]
    return jax.tree.unflatten(structure, leaves)
