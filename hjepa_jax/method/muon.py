"""Muon: weight matrices move along their orthogonalized momentum.

Adam treats each weight by itself, Muon each matrix as a whole. A momentum U S V^T becomes the
update U V^T: a direction that many examples share moves a layer no further than a rare one.

Muon of optax is not used: its supported versions scale updates differently, and one of them runs
the iteration as a loop on the device, which is slow on Apple's plugins. Query, key and value are
orthogonalized as one matrix; three separate matrices gave the same result after an epoch
(experiments/recipes).

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

# Coefficients of the quintic polynomial (Jordan 2024). It is steep at 0, so that five iterations
# suffice for all but tiny singular values. Values around 1 stay between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_UPDATE_RMS = 0.2  # root mean square of an orthogonal update; typical of AdamW (Liu et al. 2025)


class MuonState(NamedTuple):
    """The momentum, with the shapes of the parameters; zero before the first update."""

    momentum: Any


def scale_by_muon(
    momentum: float = 0.95, precision: Precision = FLOAT32
) -> optax.GradientTransformation:
    """Orthogonalized Nesterov momentum of matrices [m, n].

    Most singular values are between 0.7 and 1.2 after the iteration. The root mean square of an
    update is `_UPDATE_RMS` times that of these singular values: 0.16 to 0.2 in all cases tried. So
    the learning rate and the weight decay that follow in the chain can keep their
    values for AdamW.

    Args:
      momentum: decay rate of the momentum, in [0, 1).
      precision: precision of the matrix products of the iteration.
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
    """Approximates U V^T for each matrix U S V^T, m <= n, by Newton-Schulz iterations.

    X <- a X + (b X X^T + c (X X^T)^2) X, where X starts with norm 1. Singular values below a few
    thousandths of the norm stay smaller than 1; a matrix of zeros stays zero. Each iteration
    corrects earlier errors, so bfloat16 products are precise enough (experiments/throughput).
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
    """Orthogonalizes and scales all matrices of a tree. Matrices of equal shape form one stack.

    A network has many matrices of few shapes, so there are few large products, not many small ones.
    """
    leaves, structure = jax.tree.flatten(tree)
    groups = collections.defaultdict(list)
    for i, leaf in enumerate(leaves):
        groups[tuple(sorted(leaf.shape))].append(i)
    for (_, width), members in groups.items():
        turned = [leaves[i].shape[0] > leaves[i].shape[1] for i in members]
        stack = [leaves[i].T if t else leaves[i] for i, t in zip(members, turned, strict=True)]
        # Without the barrier XLA merges the transpose of a single matrix into its products, and
        # such a product has no fast kernel on CPUs.
        matrices = jax.lax.optimization_barrier(jnp.stack(stack))
        found = _UPDATE_RMS * width**0.5 * orthogonalize(matrices, precision)
        for k, (i, t) in enumerate(zip(members, turned, strict=True)):
            leaves[i] = found[k].T if t else found[k]
    return jax.tree.unflatten(structure, leaves)
