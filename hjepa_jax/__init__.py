"""Hierarchical joint-embedding prediction (H-JEPA) in JAX.

Importing this package starts no JAX backend and imports no TensorFlow.
"""

__version__ = "0.1.0"
