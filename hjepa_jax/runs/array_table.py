"""Type, shape and checksum of each array of a tree, as plain JSON.

table = describe_arrays(state)           # {".step": ["int32", [], 3358758404], ...}
differences(table, state)                # differing structure, types and shapes: []
changed(table, describe_arrays(state))   # paths of arrays that differ in any bit: set()

The checksum of an array is the sum, modulo 2^32, of one number per 32-bit word: the word plus a
multiple of its position, mixed. Each device sums the shards that it holds, and the host adds the
sums: 4 bytes per shard are fetched, no array is gathered, and the result does not depend on how the
array is cut. Mixing is one-to-one, so that an error within one word is always found.
"""

import functools
import json
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

# Path of a leaf -> [dtype, shape, checksum of the bytes].
ArrayTable = dict[str, list[Any]]
# From the leaves of a tree to their checksums.
Checksums = Callable[[Sequence[Any]], list[int]]

# Elements. Below, to fetch an array costs less than to compile a program for its shape.
MIN_ON_DEVICE = 2**16
# 2^32 divided by the golden ratio, and the constants of MurmurHash3's 32-bit finalizer.
_PER_POSITION, _MIX_1, _MIX_2 = map(np.uint32, (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35))


def word_checksums(leaves: Sequence[Any]) -> list[int]:
    """The checksums of this module: large arrays are summed on their devices, small ones here.

    All processes that share the arrays must call it.
    """
    copies = [_one_copy(leaf) for leaf in leaves]
    # Every program and every copy is under way before the first result is waited for.
    fetched = [_block_sums(x) if _stays_on_device(x) else x for x in copies]
    for x in fetched:
        if isinstance(x, jax.Array):
            x.copy_to_host_async()
    totals = np.array(
        [
            _total(found) if _stays_on_device(x) else _mixed_words(np.asarray(found), np).sum()
            for x, found in zip(copies, fetched, strict=True)
        ]
    ).astype(np.uint32)
    spread = np.array([_is_spread(x) for x in copies], bool)
    if spread.any():  # each process has the sums of its own shards
        of_all = multihost_utils.process_allgather(totals)
        totals = np.where(spread, of_all.sum(axis=0, dtype=np.uint32), totals)
    return totals.tolist()


def crc_checksums(leaves: Sequence[Any]) -> list[int]:
    """CRC-32 of each array's bytes, as in checkpoints of format 2; brings the arrays to the host.

    All processes that share the arrays must call it.
    """

    def whole(leaf: Any) -> np.ndarray:
        if _is_spread(leaf):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return [zlib.crc32(whole(leaf).tobytes()) for leaf in map(_one_copy, leaves)]


def describe_arrays(tree: Any, checksums: Checksums = word_checksums) -> ArrayTable:
    """Returns the table of a tree of arrays.

    Args:
      tree: arrays; where several processes share them, all must call this.
      checksums: how the checksums are computed.
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    found = checksums([leaf for _, leaf in pairs])
    return {
        jax.tree_util.keystr(path): [str(leaf.dtype), list(leaf.shape), checksum]
        for (path, leaf), checksum in zip(pairs, found, strict=True)
    }


def _one_copy(leaf: Any) -> Any:
    """`leaf`, or this process's first copy of it if every device has a full one."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    return leaf


def _is_spread(x: Any) -> bool:
    """Whether other processes hold parts of this array."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _stays_on_device(x: Any) -> bool:
    return _is_spread(x) or (isinstance(x, jax.Array) and x.size >= MIN_ON_DEVICE)


def _block_sums(x: jax.Array) -> jax.Array:
    """uint32, as many dimensions as `x`: the sum of each shard, on the device of the shard."""
    shard_shape = x.sharding.shard_shape(x.shape)
    return block_sums_fn(x.sharding, shard_shape)(x)


@functools.cache
def block_sums_fn(sharding: Any, shard_shape: tuple[int, ...]) -> Any:
    """The compiled `_block_sums` of arrays that are cut in this way."""

    def block_sums(x: jax.Array) -> jax.Array:
        pairs = [(n // size, size) for n, size in zip(x.shape, shard_shape, strict=True)]
        blocks = _mixed_words(x, jnp).reshape(*[n for pair in pairs for n in pair], -1)
        within = (*range(1, blocks.ndim, 2), blocks.ndim - 1)
        return jnp.sum(blocks, axis=within, dtype=jnp.uint32)

    # The sums of the shards lie where the shards do, so that nothing is sent between devices: on
    # virtual CPU devices, many programs that wait for each other could block for good.
    return jax.jit(block_sums, out_shardings=sharding)


def _total(sums: jax.Array) -> np.uint32:
    """The sum over this process's shards; a shard that several devices hold counts once."""
    own = [shard.data for shard in sums.addressable_shards if shard.replica_id == 0]
    return np.array([np.asarray(x).sum(dtype=np.uint32) for x in own]).sum(dtype=np.uint32)


def _mixed_words(x: Any, xp: Any) -> Any:
    """The mixed words of an array, uint32 [..., words of an element].

    Args:
      x: numbers of 8, 16, 32 or 64 bits, or booleans.
      xp: numpy, or jax.numpy within a program.
    """
    words = _words(x, xp)
    position = xp.zeros((1,) * words.ndim, np.uint32)
    for axis, size in enumerate(words.shape):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        rows = xp.arange(size, dtype=np.uint32) * stride
        position = position + rows.reshape([-1 if a == axis else 1 for a in range(words.ndim)])
    words = words + position * _PER_POSITION
    words = (words ^ (words >> 16)) * _MIX_1
    words = (words ^ (words >> 13)) * _MIX_2
    return words ^ (words >> 16)


def _words(x: Any, xp: Any) -> Any:
    if x.dtype == bool:
        return x.astype(np.uint32)[..., None]
    unsigned = np.dtype(f"u{min(x.dtype.itemsize, 4)}")
    if xp is np:
        return np.asarray(x, order="C")[..., None].view(unsigned).astype(np.uint32)
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(np.uint32)
    return bits if x.dtype.itemsize > 4 else bits[..., None]


def json_checksum(value: Any) -> int:
    """CRC-32 of a JSON value, the same before it is written and after it was read."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def changed(old: ArrayTable, new: ArrayTable) -> set[str]:
    """Paths whose entries differ, or that only one of the tables has."""
    return {path for path in old.keys() | new.keys() if old.get(path) != new.get(path)}


def differences(table: ArrayTable, tree: Any) -> list[str]:
    """Differing structure, types and shapes between a table and a tree; a phrase a leaf."""

    def phrase(entry: list[Any] | None) -> str:
        return f"{entry[0]}{entry[1]}" if entry else "absent"

    here = {
        jax.tree_util.keystr(path): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    there = {path: entry[:2] for path, entry in table.items()}
    return [
        f"{path} is {phrase(there.get(path))} there, {phrase(here.get(path))} here"
        for path in sorted(changed(there, here))
    ]
