"""Sizes that depend on the image: the grid, and counts that a config may give as fractions.

An integer is a count (or pixels). A float in (0, 1) is a fraction of the patches, or of the sides
of the image.
"""

from typing import Any

from hjepa_jax.data.sides import pair


def grid_of(config: Any) -> tuple[int, int]:
    """Returns the rows and columns of patches of an image."""
    height, width = pair(config.data.image_size)
    return height // config.model.patch_size, width // config.model.patch_size


def local_sides(config: Any) -> tuple[int, int]:
    """Returns the height and width of a further crop, in pixels."""
    size, patch_size = config.data.local_size, config.model.patch_size
    if isinstance(size, int):
        return size, size
    rows, cols = (max(1, round((size or 1.0) * side)) for side in grid_of(config))
    return rows * patch_size, cols * patch_size


def num_local_patches(config: Any) -> int | None:
    """Returns the number of patches of a further crop that the encoder sees; None = all."""
    height, width = local_sides(config)
    return _count(config.data.local_patches, height * width // config.model.patch_size**2)


def num_context(config: Any) -> int | None:
    """Returns the number of context tokens; None = the expected number of visible patches."""
    rows, cols = grid_of(config)
    return _count(config.mask.num_context, rows * cols)


def _count(amount: float | None, total: int) -> int | None:
    if amount is None or isinstance(amount, int):
        return amount
    return max(1, round(amount * total))


def counts_of(config: Any) -> dict[str, Any]:
    """Returns the fields that may be fractions, converted to counts and pixels."""
    return {
        "data.local_size": local_sides(config),
        "data.local_patches": num_local_patches(config),
        "mask.num_context": num_context(config),
    }
