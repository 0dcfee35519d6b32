"""Type, shape and checksum of each array of a tree, as plain JSON.

    table = describe_arrays(state)          # {".step": ["int32", [], 3358758404], ...}
    differences(table, state)               # leaves with another path, type or shape: []
    changed(table, describe_arrays(state))  # paths of arrays that differ in any bit: set()

The checksum of an array is a sum modulo 2^32 over its 32-bit words. Each summand is a hash of the
word and its position. The hash is one-to-one in the word, so an error within one word is always
found. Each device sums its own shards and the host adds these sums. So only 4 bytes per shard are
fetched, no array is gathered, and the sharding does not change the result.
"""

import functools
import json
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

# Path of a leaf -> [dtype, shape, checksum of the bytes].
ArrayTable = dict[str, list[Any]]

# Number of elements. Fetching a smaller array takes less time than compiling a program for it.
MIN_ON_DEVICE = 2**16
# 2^32 divided by the golden ratio, and the constants of MurmurHash3's 32-bit finalizer.
_PER_POSITION, _MIX_1, _MIX_2 = map(np.uint32, (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35))


def word_checksums(leaves: Sequence[Any]) -> list[int]:
    """Returns one checksum per array. Large arrays are summed on their devices, small ones on host.

    All processes that share the arrays must call this.
    """
    copies = [_one_copy(leaf) for leaf in leaves]
    # Starts all programs and copies before it waits for the first result.
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


def describe_arrays(tree: Any) -> ArrayTable:
    """Returns the table of a tree of arrays. All processes that share the arrays must call this."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    found = word_checksums([leaf for _, leaf in pairs])
    return {
        jax.tree_util.keystr(path): [str(leaf.dtype), list(leaf.shape), checksum]
        for (path, leaf), checksum in zip(pairs, found, strict=True)
    }


def _one_copy(leaf: Any) -> Any:
    """Returns `leaf`, or this process's first copy if every device has a full one."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    return leaf


def _is_spread(x: Any) -> bool:
    """Returns whether other processes hold parts of this array."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _stays_on_device(x: Any) -> bool:
    return _is_spread(x) or (isinstance(x, jax.Array) and x.size >= MIN_ON_DEVICE)


def _block_sums(x: jax.Array) -> jax.Array:
    """Returns the sum of each shard, on its device: uint32 with as many dimensions as `x`."""
    shard_shape = x.sharding.shard_shape(x.shape)
    return block_sums_fn(x.sharding, shard_shape)(x)


@functools.cache
def block_sums_fn(sharding: Any, shard_shape: tuple[int, ...]) -> Any:
    """Returns the compiled `_block_sums` for arrays with this sharding."""

    def block_sums(x: jax.Array) -> jax.Array:
        pairs = [(n // size, size) for n, size in zip(x.shape, shard_shape, strict=True)]
        blocks = _mixed_words(x, jnp).reshape(*[n for pair in pairs for n in pair], -1)
        within = (*range(1, blocks.ndim, 2), blocks.ndim - 1)
        return jnp.sum(blocks, axis=within, dtype=jnp.uint32)

    # The sums stay on the devices of their shards, so that devices exchange no data. On virtual CPU
    # devices, many programs that exchange data can deadlock.
    return jax.jit(block_sums, out_shardings=sharding)


def _total(sums: jax.Array) -> np.uint32:
    """Returns the sum over this process's shards; copies of one shard count once."""
    own = [shard.data for shard in sums.addressable_shards if shard.replica_id == 0]
    return np.array([np.asarray(x).sum(dtype=np.uint32) for x in own]).sum(dtype=np.uint32)


def _mixed_words(x: Any, xp: Any) -> Any:
    """Returns the hashed words of an array, uint32 [..., words per element].

    Args:
      x: numbers of 8, 16, 32 or 64 bits, or booleans.
      xp: numpy, or jax.numpy inside jit.
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
    """Returns the CRC-32 of a JSON value; writing and reading it do not change the result."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def changed(old: ArrayTable, new: ArrayTable) -> set[str]:
    """Returns the paths whose entries differ, or that only one of the tables has."""
    return {path for path in old.keys() | new.keys() if old.get(path) != new.get(path)}


def differences(table: ArrayTable, tree: Any) -> list[str]:
    """Returns one phrase for each leaf with another path, type or shape in table and tree."""

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
