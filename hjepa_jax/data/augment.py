"""Augmentation on the device, inside jit: stored images in, normalised float32 images out.

The view of an image depends only on the image and its key, not on the other images of the batch.

References:
  Chen et al. 2020, arXiv 2002.05709, appendix A (random resized crop, jitter, grayscale, blur).
  Grill et al. 2020, arXiv 2006.07733, appendix B (solarization).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from hjepa_jax.data.crop import (
    along_both,
    centre_box,
    crop_and_resize,
    resize,
    sample_crop,
    sample_whole_crop,
)
from hjepa_jax.data.pixels import full_scale
from hjepa_jax.data.sides import Sides, pair

# Weights of ITU-R BT.601 luma, which grayscale, contrast and saturation use.
LUMA = (0.299, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random resized crop, flips, colour jitter, grayscale, blur, solarization; each optional.

    Attributes:
      image_size: side of the result, pixels, or height and width.
      mean, std: per-channel statistics of pixels in [0, 1] to normalise with.
      crop_scale: area of the crop (uniform), as a fraction of the largest central box of the image
        with the shape of the result; (1, 1) keeps that box. See `reduced_sides`.
      crop_ratio: width / height of the crop, relative to the result's. Log-uniform among the ratios
        of this range for which the crop fits; if there is none, the nearest ratio that fits.
      horizontal_flip: probability of a left-right flip.
      vertical_flip: probability of an upside-down flip.
      brightness, contrast, saturation: s of a factor that is uniform in [1 - s, 1 + s].
      hue: h of a shift that is uniform in [-h, h], as a fraction of the colour circle.
      jitter_probability: probability of these four changes, all or none.
      grayscale: probability of removing the colour.
      blur: probability of a Gaussian blur.
      blur_sigma: range of its standard deviation in pixels (uniform).
      solarize: probability of inverting the pixels of 0.5 and above.
      reduced_sides: images with other sides than these are larger originals. Their crops are cut
        from the whole image, as in torchvision's RandomResizedCrop. None = all crops are cut from
        the central box.
    """

    image_size: Sides
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 1.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    # Not in `repr`, which names stored results: within a run it does not vary.
    reduced_sides: Sides | None = dataclasses.field(default=None, repr=False)

    def __call__(
        self, rngs: Shaped[Array, "B ..."], images: Num[Array, "B H W C"]
    ) -> Float[Array, "B S T C"]:
        """Augments image b with key `rngs[b]`."""
        return normalize(jax.vmap(self._augment_image)(rngs, images), self.mean, self.std)

    def _augment_image(self, rng: Array, image: Num[Array, "H W C"]) -> Float[Array, "S T C"]:
        crop_rng, flip_rng, color_rng, gray_rng = jax.random.split(rng, 4)
        x = image.astype(jnp.float32) / full_scale(image.dtype)
        whole = self.reduced_sides and image.shape[:2] != pair(self.reduced_sides)
        if self.crop_scale != (1.0, 1.0) and whole:
            (rows, cols), (height, width, _) = pair(self.image_size), image.shape
            ratio = tuple(each * cols / rows for each in self.crop_ratio)
            box = sample_whole_crop(crop_rng, height, width, self.crop_scale, ratio)
            x = crop_and_resize(x, *box, size=self.image_size)
        elif self.crop_scale != (1.0, 1.0):
            height, width, top, left = centre_box(image.shape[:2], self.image_size)
            box = sample_crop(crop_rng, height, width, self.crop_scale, self.crop_ratio)
            if top or left:
                box = (box[0] + top, box[1] + left, *box[2:])
            x = crop_and_resize(x, *box, size=self.image_size)
        else:
            x = resize(x, self.image_size, bounded=image.dtype != jnp.float32)
        if self.horizontal_flip:
            flip = _happens(flip_rng, self.horizontal_flip)
            x = jnp.where(flip, jnp.flip(x, axis=1), x)
        if self.vertical_flip:
            flip = _happens(jax.random.fold_in(rng, 4), self.vertical_flip)
            x = jnp.where(flip, jnp.flip(x, axis=0), x)
        y = _jitter(color_rng, x, self.brightness, self.contrast, self.saturation)
        if self.hue:
            hue_rng = jax.random.fold_in(rng, 7)
            y = shift_hue(y, jax.random.uniform(hue_rng, minval=-self.hue, maxval=self.hue))
        if self.jitter_probability < 1:
            changes = _happens(jax.random.fold_in(rng, 8), self.jitter_probability)
            y = jnp.where(changes, y, x)
        x = y
        if self.grayscale:
            drop = _happens(gray_rng, self.grayscale)
            x = jnp.where(drop, luma(x), x)
        if self.blur:
            blur_rng, sigma_rng = jax.random.split(jax.random.fold_in(rng, 5))
            low, high = self.blur_sigma
            sigma = jax.random.uniform(sigma_rng, minval=low, maxval=high)
            x = jnp.where(_happens(blur_rng, self.blur), gaussian_blur(x, sigma), x)
        if self.solarize:
            invert = _happens(jax.random.fold_in(rng, 6), self.solarize)
            x = jnp.where(invert & (x >= 0.5), 1.0 - x, x)
        return x


def resize_and_normalize(
    images: Num[Array, "B H W C"],
    *,
    image_size: Sides,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "B S T C"]:
    """Returns images prepared for evaluation: the central box, resized and normalised.

    The filter is the same as for image files (`hjepa_jax.data.base.fitted`). So an image has the
    same features as a file and as a row of an array, up to the rounding of its pixels.
    """
    scale, bounded = full_scale(images.dtype), images.dtype != jnp.float32
    resize_all = jax.vmap(lambda image: resize(image / scale, image_size, bounded=bounded))
    return normalize(resize_all(images.astype(jnp.float32)), mean, std)


def normalize(
    images: Float[Array, "B H W C"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W C"]:
    """(pixel - mean) / std, channel by channel."""
    shape = (1, 1, 1, -1)
    return (images - jnp.reshape(jnp.array(mean), shape)) / jnp.reshape(jnp.array(std), shape)


def luma(image: Float[Array, "H W C"]) -> Float[Array, "H W 1"]:
    """Brightness of each pixel by ITU-R BT.601."""
    return jnp.sum(image * jnp.array(LUMA)[None, None], axis=-1, keepdims=True)


def shift_hue(image: Float[Array, "H W C"], shift: Array | float) -> Float[Array, "H W C"]:
    """Shifts the hue by `shift`, a fraction of the colour circle. Value and saturation stay.

    References:
      Smith 1978, "Color gamut transform pairs" (HSV). The conversion back to RGB uses the formula
      without cases: channel n is v - v s max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6, for
      n = 5, 3, 1.
    """
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value, low = jnp.max(image, axis=-1), jnp.min(image, axis=-1)
    chroma = value - low
    size = jnp.where(chroma > 0, chroma, 1.0)
    hue = jnp.where(
        value == red,
        (green - blue) / size,
        jnp.where(value == green, 2.0 + (blue - red) / size, 4.0 + (red - green) / size),
    )
    hue = hue + 6.0 * shift
    k = jnp.mod(hue[..., None] + jnp.array([5.0, 3.0, 1.0])[None, None], 6.0)
    part = jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)
    return value[..., None] - chroma[..., None] * part


def gaussian_blur(image: Float[Array, "S T C"], sigma: Array | float) -> Float[Array, "S T C"]:
    """Convolves with a Gaussian of standard deviation `sigma`, in pixels.

    At the border the weights of the existing pixels are scaled to a sum of 1.
    """

    def weights(size: int) -> Float[Array, "S S"]:
        distance = jnp.arange(size)[:, None] - jnp.arange(size)[None]
        weight = jnp.exp(-0.5 * (distance / sigma) ** 2)
        return weight / jnp.sum(weight, axis=1, keepdims=True)

    return along_both(weights(image.shape[0]), weights(image.shape[1]), image)


def _happens(rng: Array, probability: float) -> Array:
    return jax.random.uniform(rng) < probability


def _jitter(
    rng: Array, x: Float[Array, "H W C"], brightness: float, contrast: float, saturation: float
) -> Float[Array, "H W C"]:
    """Brightness, contrast and saturation, in this order, clipped to [0, 1] after each."""
    rngs = jax.random.split(rng, 3)

    def factor(i: int, strength: float) -> Array:
        return jax.random.uniform(rngs[i], minval=1.0 - strength, maxval=1.0 + strength)

    if brightness:
        x = jnp.clip(x * factor(0, brightness), 0.0, 1.0)
    if contrast:
        mean = jnp.mean(luma(x))
        x = jnp.clip(mean + (x - mean) * factor(1, contrast), 0.0, 1.0)
    if saturation:
        gray = luma(x)
        x = jnp.clip(gray + (x - gray) * factor(2, saturation), 0.0, 1.0)
    return x
