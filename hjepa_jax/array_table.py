"""What the arrays of a tree are: type, shape and checksum of each leaf, as plain JSON.

table = describe_arrays(state)           # {".step": ["int32", [], 3358758404], ...}
differences(table, state)                # what differs in structure, types and shapes: []
changed(table, describe_arrays(state))   # ... and in a single bit: set()
"""

import json
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Path of a leaf -> [dtype, shape, CRC-32 of the bytes].
ArrayTable = dict[str, list[Any]]


def describe_arrays(tree: Any) -> ArrayTable:
    """The table of a tree of arrays, which are brought to the host, one after the other.

    Of arrays that are spread over several processes all processes must ask.
    """
    table = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            array = multihost_utils.process_allgather(leaf, tiled=True)
        else:
            array = np.asarray(jax.device_get(leaf))
        checksum = zlib.crc32(array.tobytes())
        table[jax.tree_util.keystr(path)] = [str(array.dtype), list(array.shape), checksum]
    return table


def json_checksum(value: Any) -> int:
    """CRC-32 of a JSON value, the same before it is written and after it was read."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def changed(old: ArrayTable, new: ArrayTable) -> set[str]:
    """Paths whose entries differ, or that only one of the tables has."""
    return {path for path in old.keys() | new.keys() if old.get(path) != new.get(path)}


def differences(table: ArrayTable, tree: Any) -> list[str]:
    """What differs in structure, types and shapes between a table and a tree, a phrase a leaf."""

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
