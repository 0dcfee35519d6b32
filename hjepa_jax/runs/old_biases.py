"""Checkpoints of up to commit b92d0cf, whose projection had biases that changed nothing.

Its hidden layers were followed by a standardization, which takes a bias away again. Such a
checkpoint is read with the biases, and goes on without them: the network computes the same.
"""

from typing import Any

import jax

_LAYERS = ("0", "1")


def _is_projection(node: Any) -> bool:
    return isinstance(node, dict) and {"hidden_0", "norm_0", "out"} <= node.keys()


def with_old_biases(tree: Any) -> Any:
    """The tree as it was then: each hidden layer has a bias, like that of the norm behind it."""

    def add(node: Any) -> Any:
        if not _is_projection(node):
            return node
        hidden = {
            f"hidden_{i}": {**node[f"hidden_{i}"], "bias": node[f"norm_{i}"]["bias"]}
            for i in _LAYERS
        }
        return {**node, **hidden}

    return jax.tree.map(add, tree, is_leaf=_is_projection)


def without_old_biases(tree: Any) -> Any:
    """The tree as it is today."""

    def remove(node: Any) -> Any:
        if not _is_projection(node):
            return node
        hidden = {f"hidden_{i}": {"kernel": node[f"hidden_{i}"]["kernel"]} for i in _LAYERS}
        return {**node, **hidden}

    return jax.tree.map(remove, tree, is_leaf=_is_projection)
