"""PRNG keys of a step: for each image, view and mask, folded from (run, step, row)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from hjepa_jax.masks.choice import lowest_first

# A row number that no image of a batch has: batches are smaller than 2^20.
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
    """The key of a step for draws that all images share."""
    return jax.random.fold_in(jax.random.fold_in(rng, step), NO_IMAGE)


def view_rngs(augment_rngs: Shaped[Array, "B ..."], view: int) -> Shaped[Array, "B ..."]:
    """The keys of view `view` >= 2 of each image. The masked view is number 1: `augment_rngs`."""
    return jax.vmap(lambda rng: jax.random.fold_in(rng, NO_IMAGE + 1 - view))(augment_rngs)


def some_patches(
    augment_rngs: Shaped[Array, "B ..."], *, num_patches: int, k: int
) -> Int[Array, "B K"]:
    """K random patches of each view, all equally likely, from the key of the view."""

    def choose(rng: Array) -> Array:
        u = jax.random.uniform(jax.random.fold_in(rng, NO_IMAGE), (num_patches,))
        return lowest_first(u, jnp.array(k), k)[0]

    return jax.vmap(choose)(augment_rngs)
