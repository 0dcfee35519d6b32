"""The masks of a batch as index arrays, and the two operations that read them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from hjepa_jax.masks.choice import MAX_COMPARED

# A raw uint32 key, which checkpoints and every plugin support, or a typed key.
Rng = UInt32[Array, "2"] | PRNGKeyArray


@struct.dataclass
class Masks:
    """The masks of a batch (or of one image, without the leading axis B).

    Attributes:
      context_index: int32 [B, K], patches that the context encoder sees.
      context_valid: bool [B, K], False where the entry is padding.
      target_index: int32 [B, M, T], the patches of each target block.
      target_valid: bool [B, M, T].
    """

    context_index: Any
    context_valid: Any
    target_index: Any
    target_valid: Any


def gather_tokens(
    x: Float[Array, "B N D"] | Float[Array, "N D"], index: Int[Array, "B K"]
) -> Float[Array, "B K D"]:
    """Rows `x[b, index[b, k]]` (or `x[index[b, k]]` of a table that all images share).

    Computed as a product with a one-hot matrix: its gradient is a product, too. The gradient of an
    indexed gather is a scatter, which is slow on some backends and refused by others.
    """
    one_hot = (index[..., None] == jnp.arange(x.shape[-2])[None, None]).astype(x.dtype)
    # HIGHEST copies rows exactly. By default some backends round the product.
    return jnp.matmul(one_hot, x, precision=jax.lax.Precision.HIGHEST)


def target_union(masks: Masks, num_patches: int) -> Bool[Array, "B N"]:
    """Which patches at least one target block covers."""
    if num_patches > MAX_COMPARED:  # M T N comparisons would cost too much; see `rank`
        b = len(masks.target_index)
        image = jnp.arange(b)[:, None]
        places = masks.target_index.reshape(b, -1), masks.target_valid.reshape(b, -1)
        return jnp.zeros((b, num_patches), bool).at[image, places[0]].max(places[1])
    patches = jnp.arange(num_patches)[None, None, None]
    hit = (masks.target_index[..., None] == patches) & masks.target_valid[..., None]
    return jnp.any(hit, axis=(1, 2))
