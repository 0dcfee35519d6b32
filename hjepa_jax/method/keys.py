"""PRNG keys of a step: one for each image, view and mask, folded from (run, step, row)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from hjepa_jax.masks.choice import lowest_first

# Number of no image of a batch: those are below 2^20.
NO_IMAGE = 2**31 - 1


def image_rngs(
    rng: Array, step: Int[Array, ""], batch_size: int
) -> tuple[Shaped[Array, "B ..."], Shaped[Array, "B ..."]]:
    """Keys (augment_rng, mask_rng) of image b of a step, from fold_in(fold_in(rng, step), b)."""
    step_rng = jax.random.fold_in(rng, step)
    rngs = jax.vmap(lambda row: jax.random.fold_in(step_rng, row))(jnp.arange(batch_size))
    pairs = jax.vmap(jax.random.split)(rngs)
    return pairs[:, 0], pairs[:, 1]


def batch_rng(rng: Array, step: Int[Array, ""]) -> Array:
    """The key of a step that belongs to no image, and so is the same for all of them."""
    return jax.random.fold_in(jax.random.fold_in(rng, step), NO_IMAGE)


def view_rngs(augment_rngs: Shaped[Array, "B ..."], view: int) -> Shaped[Array, "B ..."]:
    """The keys of a further view of each image, from 1; the first view has `augment_rngs`."""
    return jax.vmap(lambda rng: jax.random.fold_in(rng, NO_IMAGE + 1 - view))(augment_rngs)


def some_patches(
    augment_rngs: Shaped[Array, "B ..."], *, num_patches: int, k: int
) -> Int[Array, "B K"]:
    """K of the patches of each view, any as likely as any other, by the key of the view."""

    def choose(rng: Array) -> Array:
        u = jax.random.uniform(jax.random.fold_in(rng, NO_IMAGE), (num_patches,))
        return lowest_first(u, jnp.array(k), k)[0]

    return jax.vmap(choose)(augment_rngs)


def more_rngs(rngs: Shaped[Array, "B ..."], count: int) -> Shaped[Array, "K ..."]:
    """`count` keys for each of B, one image after the other, K = B * count."""
    found = jax.vmap(lambda rng: jax.random.split(rng, count))(rngs)
    return found.reshape(-1, *found.shape[2:])
