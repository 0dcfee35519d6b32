"""Sizes as a config may give them: sides of squares and rectangles, counts and fractions.

`AMOUNT` and `SIDES` are types of config fields. This module loads no JAX.
"""

import math
from collections.abc import Sequence

# Sides of an image in pixels, or of a grid in patches: the side of a square, or (height, width).
Sides = int | tuple[int, int]


SAMPLE = 25  # number of images from which `stored_sides` is computed


def pair(sides: Sides) -> tuple[int, int]:
    """Returns height and width."""
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


def stored_sides(
    sizes: Sequence[tuple[int, int]], image_size: Sides, max_area: float
) -> tuple[int, int]:
    """Returns the height and width at which training images are stored, to cut crops from them.

    Args:
      sizes: heights and widths of some images. The result has their geometric means, so that
        images that all have one shape are not cropped.
      image_size: sides of the images that the model sees.
      max_area: largest area of the result, as a multiple of the area of `image_size`. If it is 1,
        or `sizes` is empty, the result is `image_size`.
    """
    rows, cols = pair(image_size)
    if max_area == 1 or not sizes:
        return rows, cols
    height, width = (
        math.exp(math.fsum(map(math.log, x)) / len(x)) for x in zip(*sizes, strict=True)
    )
    scale = min(1.0, math.sqrt(max_area * rows * cols / (height * width)))
    return max(1, round(height * scale)), max(1, round(width * scale))


# Types of config fields. `AMOUNT`: an integer, a fraction in (0, 1), or None. `SIDES`: see `Sides`.
AMOUNT, SIDES = (int, float), (int, tuple)
