"""Random choices for use inside jit: ranks, the K lowest entries, a random integer.

Up to `MAX_COMPARED` entries they need no sort, which not every backend supports.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def lowest_first(
    order: Float[Array, " N"], count: Int[Array, ""], capacity: int
) -> tuple[Int[Array, " K"], Bool[Array, " K"]]:
    """Index and validity of the `count` patches with the lowest `order`, padded to `capacity`."""
    valid = jnp.arange(capacity) < count
    if len(order) > MAX_COMPARED:  # K x N comparisons would cost too much; see `rank`
        index = jnp.argsort(order, stable=True)[:capacity].astype(jnp.int32)
        return jnp.where(valid, index, 0), valid
    is_slot = rank(order)[None, :] == jnp.arange(capacity)[:, None]
    index = jnp.sum(is_slot * jnp.arange(len(order))[None], axis=1, dtype=jnp.int32)
    return jnp.where(valid, index, 0), valid


MAX_COMPARED = 4096  # largest number of entries that are compared pairwise: 64 x 64 patches


def is_first_smallest(x: Float[Array, " N"]) -> Bool[Array, " N"]:
    """Marks the smallest entry; among equal entries the first."""
    index = jnp.arange(x.shape[0])
    first = jnp.min(jnp.where(x == jnp.min(x), index, x.shape[0]))
    return index == first


def rank(x: Float[Array, " N"]) -> Int[Array, " N"]:
    """Position of each entry in ascending order, ties broken by index: a permutation of 0..N-1.

    Up to `MAX_COMPARED` entries are compared pairwise, which every backend supports. More entries
    are sorted, with the same result, because N^2 comparisons per image would cost too much.
    `build_model` refuses such grids on a backend that does not sort reliably.
    """
    if x.shape[0] > MAX_COMPARED:
        return jnp.argsort(jnp.argsort(x, stable=True), stable=True).astype(jnp.int32)
    index = jnp.arange(x.shape[0])
    smaller = x[None, :] < x[:, None]
    tied_before = (x[None, :] == x[:, None]) & (index[None, :] < index[:, None])
    return jnp.sum(smaller | tied_before, axis=1, dtype=jnp.int32)


def uniform_int(u: Float[Array, ""], num_values: Int[Array, ""] | int) -> Int[Array, ""]:
    """Uniform on 0..num_values-1 for u uniform on [0, 1)."""
    value = jnp.floor(u * num_values).astype(jnp.int32)
    return jnp.minimum(value, num_values - 1)  # u * n may round up to n
