"""Choices without sorting, which not every backend can do: ranks, the K first, a whole number."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def lowest_first(
    order: Float[Array, " N"], count: Int[Array, ""], capacity: int
) -> tuple[Int[Array, " K"], Bool[Array, " K"]]:
    """The patches that come first in ascending `order`, `count` of them, padded to `capacity`."""
    valid = jnp.arange(capacity) < count
    if len(order) > MAX_COMPARED:  # K x N comparisons would cost too much; see `rank`
        index = jnp.argsort(order, stable=True)[:capacity].astype(jnp.int32)
        return jnp.where(valid, index, 0), valid
    is_slot = rank(order)[None, :] == jnp.arange(capacity)[:, None]
    index = jnp.sum(is_slot * jnp.arange(len(order))[None], axis=1, dtype=jnp.int32)
    return jnp.where(valid, index, 0), valid


MAX_COMPARED = 4096  # most entries that are compared pairwise: 64 x 64 patches


def is_first_smallest(x: Float[Array, " N"]) -> Bool[Array, " N"]:
    """Marks the smallest entry; of equal ones the first."""
    index = jnp.arange(x.shape[0])
    first = jnp.min(jnp.where(x == jnp.min(x), index, x.shape[0]))
    return index == first


def rank(x: Float[Array, " N"]) -> Int[Array, " N"]:
    """Position of each entry in ascending order, ties broken by index: a permutation of 0..N-1.

    Up to `MAX_COMPARED` entries each is compared with each, which every backend can. Above, N^2
    comparisons for each image cost too much, and entries are sorted, with the same result.
    `build_model` refuses such grids where the backend does not sort reliably.
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
