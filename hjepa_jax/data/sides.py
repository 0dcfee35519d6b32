"""Sizes as a config may give them: sides of squares and rectangles, counts and fractions.

`Amount` is the type of config fields. This module loads no JAX.
"""

import abc

# Sides of an image in pixels, or of a grid in patches: one of a square, or (height, width).
Sides = int | tuple[int, int]


def pair(sides: Sides) -> tuple[int, int]:
    """Returns height and width."""
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


class Amount(abc.ABC):
    """A whole number, a fraction in (0, 1), or None for automatic."""


Amount.register(int)
Amount.register(float)
