"""Random crops of images, resized by separable interpolation: two matrix products."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hjepa_jax.data.sides import Sides, pair

CROP_TRIES = 10  # the same number as torchvision


def crop_and_resize(
    image: Float[Array, "H W C"],
    top: Array | float,
    left: Array | float,
    height: Array | float,
    width: Array | float,
    *,
    size: Sides,
) -> Float[Array, "S T C"]:
    """Cuts a box (in pixels, fractions allowed) out of the image and resizes it to `size`.

    Linear interpolation, antialiased if the box shrinks. For a box that is the whole image the
    result equals `jax.image.resize(..., "linear")`. At the border of the box the interpolation also
    uses pixels outside of it.
    """
    num_rows, num_cols = pair(size)
    rows = _resize_matrix(top, height, image.shape[0], num_rows)
    cols = _resize_matrix(left, width, image.shape[1], num_cols)
    return along_both(rows, cols, image)


def resize(
    image: Float[Array, "H W C"], size: Sides, *, bounded: bool = True
) -> Float[Array, "S T C"]:
    """Returns the largest central box of the image, resized; the image itself if it has that size.

    Args:
      image: the image.
      size: pixels per side of the result, or height and width.
      bounded: whether pixels lie in [0, 1], as pixels of integer types do; the result is then
        clipped to [0, 1].
    """
    sides = image.shape[:2]
    if sides == pair(size):
        return image
    *box, top, left = centre_box(sides, size)
    rows, cols = (
        _resize_matrix(start, length, num_pixels, num_results, cubic=True)
        for start, length, num_pixels, num_results in zip(
            (top, left), box, sides, pair(size), strict=True
        )
    )
    # The cubic filter overshoots. Pillow clips after each of its two passes, first along rows.
    clip = functools.partial(jnp.clip, min=0.0, max=1.0) if bounded else lambda x: x
    wide = clip(jnp.matmul(cols[None], image, precision="highest"))
    high = clip(jnp.matmul(rows, wide.reshape(sides[0], -1), precision="highest"))
    return high.reshape(*pair(size), wide.shape[2])


def centre_box(sides: tuple[int, ...], size: Sides) -> tuple[float, float, float, float]:
    """Returns height, width, top and left of the largest central box of the shape of `size`.

    `hjepa_jax.data.base.fitted` cuts the same box out of an image file. So no image is ever
    distorted.
    """
    (height, width), (rows, cols) = sides, pair(size)
    if height * cols > width * rows:
        box = width * rows / cols, float(width)
    else:
        box = float(height), height * cols / rows
    return *box, (height - box[0]) / 2, (width - box[1]) / 2


def _resize_matrix(
    start: Array | float, length: Array | float, num_pixels: int, size: int, *, cubic: bool = False
) -> Float[Array, "S H"]:
    """Returns the interpolation weights: row i has the weights of pixel i of the result.

    The filter is linear, or cubic as in Pillow (Keys 1981, "Cubic convolution interpolation for
    digital image processing", equation 15: a = -1/2). Both are widened if the image shrinks.
    """
    stride = length / size
    center = (jnp.arange(size) + 0.5) * stride + start - 0.5
    reach = jnp.maximum(stride, 1.0)
    distance = jnp.abs(center[:, None] - jnp.arange(num_pixels)[None])
    d = distance / reach
    if cubic:
        near, far = (1.5 * d - 2.5) * d * d + 1.0, ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
        weight = jnp.where(d < 1.0, near, jnp.where(d < 2.0, far, 0.0))
    else:
        weight = jnp.maximum(1.0 - d, 0.0)
    return weight / jnp.sum(weight, axis=1, keepdims=True)


def along_both(
    rows: Float[Array, "S H"], cols: Float[Array, "T W"], image: Float[Array, "H W C"]
) -> Float[Array, "S T C"]:
    """Applies weights to the rows, then to the columns, in float32 on every backend."""
    h, w, c = image.shape
    x = jnp.matmul(rows, image.reshape(h, w * c), precision="highest").reshape(len(rows), w, c)
    return jnp.matmul(cols[None], x, precision="highest")


def sample_crop(
    rng: Array,
    height: float,
    width: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Array, Array, Array, Array]:
    """Returns top, left, height and width of a random box inside a larger one, in pixels."""
    area_rng, ratio_rng, top_rng, left_rng = jax.random.split(rng, 4)
    area = jax.random.uniform(area_rng, minval=scale[0], maxval=scale[1]) * height * width
    # A box of this area fits if its ratio is between the ratios of the highest and the widest box.
    low, high = jnp.clip(jnp.array(ratio) * (width / height), area / height**2, width**2 / area)
    u = jax.random.uniform(ratio_rng)
    aspect = jnp.exp(jnp.log(low) + u * (jnp.log(high) - jnp.log(low)))
    crop_width = jnp.minimum(jnp.sqrt(area * aspect), width)
    crop_height = jnp.minimum(jnp.sqrt(area / aspect), height)
    top = jax.random.uniform(top_rng) * (height - crop_height)
    left = jax.random.uniform(left_rng) * (width - crop_width)
    return top, left, crop_height, crop_width


def sample_whole_crop(
    rng: Array, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, ...]
) -> tuple[Array, Array, Array, Array]:
    """Returns top, left, height and width of a random box, as torchvision's RandomResizedCrop.

    Area (uniform) and aspect ratio (log-uniform) are drawn together until the box fits, at most
    `CROP_TRIES` times. If none fits, the box is the largest central one with an allowed ratio.
    Sides are not rounded to whole pixels.

    Args:
      rng: key of the image.
      height: height of the image, pixels.
      width: width of the image, pixels.
      scale: smallest and largest area of the box, fraction of the image.
      ratio: smallest and largest width / height of the box.
    """
    area_rng, ratio_rng, top_rng, left_rng = jax.random.split(rng, 4)
    tries = (CROP_TRIES,)
    area = height * width * jax.random.uniform(area_rng, tries, minval=scale[0], maxval=scale[1])
    low, high = (math.log(each) for each in ratio)
    aspect = jnp.exp(jax.random.uniform(ratio_rng, tries, minval=low, maxval=high))
    heights, widths = jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)
    fits = (heights <= height) & (widths <= width)
    at_top, at_left = jax.random.uniform(top_rng), jax.random.uniform(left_rng)
    central = min(height, width / ratio[0]), min(width, height * ratio[1])
    box = jnp.array([*central, 0.5, 0.5])
    for i in reversed(range(CROP_TRIES)):  # the first that fits
        box = jnp.where(fits[i], jnp.stack([heights[i], widths[i], at_top, at_left]), box)
    crop_height, crop_width, at_top, at_left = box
    top, left = at_top * (height - crop_height), at_left * (width - crop_width)
    return top, left, crop_height, crop_width
