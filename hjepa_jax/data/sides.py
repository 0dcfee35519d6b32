"""Sizes as a config may give them: sides of squares and rectangles, counts and fractions.

`AMOUNT` and `SIDES` are types of config fields. This module loads no JAX.
"""

# Sides of an image in pixels, or of a grid in patches: one of a square, or (height, width).
Sides = int | tuple[int, int]


def pair(sides: Sides) -> tuple[int, int]:
    """Returns height and width."""
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


# Types of config fields: a whole number, a fraction in (0, 1), or None for automatic; `Sides`.
AMOUNT, SIDES = (int, float), (int, tuple)
