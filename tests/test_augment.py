import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp

from hjepa_jax.data.augment import (
    Augment,
    luma,
    resize_and_normalize,
    shift_hue,
)
from hjepa_jax.data.base import fitted
from hjepa_jax.data.crop import crop_and_resize, sample_whole_crop
from hjepa_jax.evaluation.features import embed_pixels

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.integers(0, 256, (6, 16, 16, 3), np.uint8))
RNGS = jax.random.split(jax.random.PRNGKey(0), 6)
UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def views_of(images, rngs=RNGS, size=16, **options):
    """Returns the augmented images, computed by one compiled program."""
    return np.asarray(jax.jit(Augment(size, **UNIT, **options))(rngs, jnp.asarray(images)))


def copies(count, seed=2):
    """Returns `count` copies of the first image, and a PRNG key for each copy."""
    images = jnp.broadcast_to(IMAGES[:1], (count, 16, 16, 3))
    return images, jax.random.split(jax.random.PRNGKey(seed), count)


crop = jax.jit(crop_and_resize, static_argnames="size")
resized = jax.jit(resize_and_normalize, static_argnames=("image_size", "mean", "std"))


@pytest.mark.parametrize("size", [16, 40, 5])
def test_whole_image_is_resized_as_jax_image_does(size):
    image = IMAGES[0] / 255.0
    got = crop(image, 0.0, 0.0, 16.0, 16.0, size=size)
    expected = jax.image.resize(image, (size, size, 3), "linear", antialias=True)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_without_options_only_normalisation_is_left():
    scale = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    expected = (np.asarray(IMAGES) / 255.0 - scale["mean"]) / scale["std"]
    np.testing.assert_allclose(jax.jit(Augment(16, **scale))(RNGS, IMAGES), expected, atol=1e-5)
    np.testing.assert_allclose(resized(IMAGES, image_size=16, **scale), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 80), (80, 32), (33, 80)])
def test_an_image_that_is_not_square_is_cropped_and_never_squashed(shape):
    """Stored images are cropped to the same square as images from files."""
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize(shape[::-1])
    expected, expected_32 = (fitted(smooth, size) / 255.0 for size in (16, 32))
    squashed = np.asarray(smooth.resize((16, 16))) / 255.0
    assert np.abs(squashed - expected).max() > 0.3
    images = jnp.asarray(np.asarray(smooth))[None]
    for got in (
        resized(images, image_size=16, **UNIT),
        views_of(images, RNGS[:1]),
        views_of(images, RNGS[:1], crop_scale=(0.999, 1.0), crop_ratio=(1.0, 1.0)),
    ):
        np.testing.assert_allclose(got[0], expected, atol=0.04)  # the last uses a linear filter
    pixels = embed_pixels(None, images)["pixels"].reshape(32, 32, 3)
    np.testing.assert_allclose(pixels, expected_32, atol=0.04)


def test_raw_pixels_show_the_part_that_the_encoder_sees():
    image = np.zeros((1, 48, 100, 3), np.uint8)
    image[:, :, 6:94] = 255  # a little wider than the part that an encoder for 48x80 sees
    pixels = embed_pixels(None, jnp.asarray(image), image_size=(48, 80))["pixels"]
    assert pixels.min() > 0.99
    assert pixels.shape[1] == 19 * 32 * 3


@pytest.mark.parametrize("shape", [(32, 80), (50, 40), (24, 40), (12, 20)])
def test_an_image_of_another_shape_is_cut_to_the_rectangle_and_never_squashed(shape):
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize(shape[::-1])
    expected = fitted(smooth, (12, 20)) / 255.0
    assert expected.shape == (12, 20, 3)
    images = jnp.asarray(np.asarray(smooth))[None]
    for got in (
        resize_and_normalize(images, image_size=(12, 20), **UNIT),
        Augment((12, 20), **UNIT)(RNGS[:1], images),
        Augment((12, 20), **UNIT, crop_scale=(0.999, 1.0), crop_ratio=(1.0, 1.0))(RNGS[:1], images),
    ):
        np.testing.assert_allclose(got[0], expected, atol=0.05)  # the last uses a linear filter


@pytest.mark.parametrize(("side", "size"), [(32, 32), (32, 16), (33, 20), (16, 40), (8, 56)])
def test_stored_images_are_resized_as_image_files_are(side, size):
    stored = np.random.default_rng(2).integers(0, 256, (side, side, 3), np.uint8)
    expected = fitted(Image.fromarray(stored), size) / 255.0
    got = resized(jnp.asarray(stored)[None], image_size=size, **UNIT)[0]
    np.testing.assert_allclose(got, expected, atol=1.6 / 255)  # Pillow rounds twice
    linear = crop(jnp.asarray(stored) / 255.0, 0.0, 0.0, side, side, size=size)
    assert side == size or np.abs(linear - expected).max() > 5 / 255


def test_crops_stay_inside_and_keep_their_area_range():
    """In a crop of a ramp image, the mean gives the centre of the crop and the range its size."""
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    rngs = jax.random.split(jax.random.PRNGKey(1), 400)
    options = {"crop_scale": (0.25, 0.64), "crop_ratio": (1.0, 1.0)}
    views = views_of(np.tile(ramp[None], (400, 1, 1, 1)), rngs, 32, **options)
    row = views[:, 0, :, 0]
    assert np.all(np.diff(row, axis=1) > -0.01), "a crop reaches beyond the border"
    width = (row[:, -1] - row[:, 0]) * 64 * 32 / 31
    assert width.min() > 0.5 * 64 - 3
    assert width.max() < 0.8 * 64 + 3
    assert row[:, 0].min() < 0.02
    assert row[:, -1].max() > 0.98


@pytest.mark.parametrize(("height", "width", "side"), [(64, 64, 64), (32, 96, 32), (97, 48, 48)])
def test_a_crop_has_the_area_drawn_for_it_in_the_central_square(height, width, side):
    # The ramps go from 0 to 255 within the central square.
    across = np.linspace(0, 255, side)[np.clip(np.arange(width) - (width - side) // 2, 0, side - 1)]
    down = np.linspace(0, 255, side)[np.clip(np.arange(height) - (height - side) // 2, 0, side - 1)]
    across, down = across[None, :], down[:, None]
    image = np.stack(np.broadcast_arrays(across, down, 0), axis=-1).round().astype(np.uint8)
    rngs = jax.random.split(jax.random.PRNGKey(1), 200)
    options = {"crop_scale": (0.7, 0.7), "crop_ratio": (0.5, 2.0)}
    views = views_of(np.tile(image[None], (200, 1, 1, 1)), rngs, 32, **options)
    middle = views[:, 8:24, 8:24]  # away from the border, because pixels beyond it are missing
    scale = 32 / 15 * (side - 1) / side
    across = (middle[:, 0, -1, 0] - middle[:, 0, 0, 0]) * scale
    down = (middle[:, -1, 0, 1] - middle[:, 0, 0, 1]) * scale
    np.testing.assert_allclose(across * down, 0.7, rtol=0.06)  # a part of the square, unsquashed
    assert max(across.max(), down.max()) < 1.04
    ratios = across / down
    assert (ratios.min(), ratios.max()) == pytest.approx((0.7, 1 / 0.7), rel=0.06)


def drawn_as_torchvision(rng, height, width, scale, ratio):
    """Returns height, width, top and left of a box by the rules of RandomResizedCrop."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if w <= width and h <= height:
            return h, w, rng.uniform(0, height - h), rng.uniform(0, width - w)
    w, h = width, height
    if width / height < ratio[0]:
        h = width / ratio[0]
    elif width / height > ratio[1]:
        w = height * ratio[1]
    return h, w, (height - h) / 2, (width - w) / 2


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(375, 500, (0.3, 1.0)), (64, 64, (0.08, 1.0)), (300, 40, (0.05, 0.6)), (20, 90, (0.9, 1.0))],
)
def test_crops_of_originals_are_distributed_as_torchvision_draws_them(height, width, scale):
    ratio, rng = (3 / 4, 4 / 3), np.random.default_rng(0)
    draw = jax.vmap(lambda key: sample_whole_crop(key, height, width, scale, ratio))
    top, left, h, w = map(np.asarray, jax.jit(draw)(jax.random.split(jax.random.PRNGKey(0), 8000)))
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height + 1e-3).all()
    assert (left + w <= width + 1e-3).all()
    theirs = [drawn_as_torchvision(rng, height, width, scale, ratio) for _ in range(8000)]
    columns = np.array(theirs, np.float32).T
    for ours, other in ((h * w, columns[0] * columns[1]), (w / h, columns[1] / columns[0]),
                        (top, columns[2]), (left, columns[3])):  # fmt: skip
        # Equal values with different rounding must not count as a difference.
        distance = ks_2samp(np.round(ours, 3), np.round(other, 3)).statistic
        assert distance < 0.03  # equal distributions stay below 0.031 with a probability of 0.999


def test_crops_show_the_detail_of_originals_and_reach_their_sides():
    """Crops of originals show stripes and the ends of the image. The reduced square lost both."""
    stripes = np.zeros((1, 96, 128, 3), np.uint8)
    stripes[:, :, ::2] = 255
    stripes[:, :, :10, 1] = 0
    reduced = fitted(Image.fromarray(stripes[0]), 32)[None]
    rngs = jax.random.split(jax.random.PRNGKey(0), 100)
    options = {"crop_scale": (0.04, 0.05), "crop_ratio": (0.9, 1.1), "reduced_sides": 32}
    sharp, dull = (
        views_of(np.repeat(images, 100, axis=0), rngs, 32, **options)
        for images in (stripes, reduced)
    )
    assert sharp[..., 0].std(axis=(1, 2)).min() > 0.25
    assert dull[..., 0].std(axis=(1, 2)).max() < 0.1
    ends = (sharp[..., 1].mean(axis=(1, 2)) < 0.4).sum()
    assert 2 < ends < 30
    assert dull[..., 1].mean(axis=(1, 2)).min() > 0.4


def test_images_of_the_size_of_the_model_keep_their_crops():
    options = {"crop_scale": (0.3, 1.0)}
    before = views_of(IMAGES, **options)
    np.testing.assert_array_equal(views_of(IMAGES, reduced_sides=16, **options), before)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs with SciPy. Weights beyond the border are left out."""
    kwargs = {"sigma": (sigma, sigma, 0), "mode": "constant", "truncate": 16.0}
    image = image.astype(np.float64)
    return gaussian_filter(image, **kwargs) / gaussian_filter(np.ones_like(image), **kwargs)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("horizontal_flip", lambda image: image[:, ::-1]),
        ("vertical_flip", lambda image: image[::-1]),
        ("solarize", lambda x: np.asarray(ImageOps.solarize(Image.fromarray(x), threshold=128))),
        ("blur", lambda image: blurred(image, 1.3)),
    ],
)
def test_random_operations_agree_with_other_implementations(option, expected):
    views = views_of(*copies(300), **{option: 0.3}, blur_sigma=(1.3, 1.3))
    assert_a_share_is_changed(views, expected(np.asarray(IMAGES[0])) / 255.0)


def assert_a_share_is_changed(views, changed):
    """Checks that 30 % of the views equal `changed` and all others equal the first image."""
    changed, same = (
        np.isclose(views, expected, atol=1e-5).all(axis=(1, 2, 3))
        for expected in (changed, np.asarray(IMAGES[0]) / 255.0)
    )
    assert np.all(changed ^ same)
    assert abs(changed.mean() - 0.3) < 0.09


def test_how_much_an_image_is_blurred_is_drawn_from_the_whole_range():
    views = views_of(*copies(100, seed=3), blur=1.0, blur_sigma=(0.5, 2.0))
    # A stronger blur gives a smaller standard deviation.
    sigmas = np.linspace(0.5, 2.0, 61)
    flat = [np.std(blurred(np.asarray(IMAGES[0]), sigma) / 255.0) for sigma in sigmas]
    found = np.interp(-views.std(axis=(1, 2, 3)), -np.array(flat), sigmas, left=0, right=9)
    assert found.min() == pytest.approx(0.5, abs=0.1)
    assert found.max() == pytest.approx(2.0, abs=0.1)
    assert found.mean() == pytest.approx(1.25, abs=0.15)


def test_operations_with_probability_0_are_not_in_the_program():
    default = str(jax.make_jaxpr(Augment(16, **UNIT))(RNGS, IMAGES))
    every = Augment(16, **UNIT, vertical_flip=0.5, blur=0.5, solarize=0.5)
    program = str(jax.make_jaxpr(every)(RNGS, IMAGES))
    for name in ("rev[", "dot_general", "exp ", "ge "):
        assert name in program
        assert name not in default


def test_grayscale_leaves_three_equal_channels_of_luma():
    views = views_of(IMAGES, grayscale=1.0)
    expected = (np.asarray(IMAGES) / 255.0) @ np.array([0.299, 0.587, 0.114])
    for channel in range(3):
        np.testing.assert_allclose(views[..., channel], expected, atol=1e-5)


def test_brightness_scales_all_pixels_of_an_image_alike():
    images = (IMAGES // 4).astype(jnp.uint8)
    ratio = views_of(images, brightness=0.5) / np.maximum(np.asarray(images) / 255.0, 1e-9)
    ratio = np.where(np.asarray(images) > 0, ratio, np.nan).reshape(6, -1)
    assert np.all(np.nanstd(ratio, axis=1) < 1e-3)
    factors = np.nanmean(ratio, axis=1)
    assert np.all((factors > 0.5) & (factors < 1.5))
    assert np.ptp(factors) > 0.3, "images must have different factors"


def test_contrast_keeps_the_mean_luma_and_saturation_every_luma():
    images = (96 + IMAGES // 8).astype(jnp.uint8)  # far enough from 0 and 1 that nothing is clipped
    luma_of = jax.jit(jax.vmap(luma))
    before = luma_of(images / 255.0)
    contrast = luma_of(views_of(images, contrast=0.5))
    means = (x.mean(axis=(1, 2, 3)) for x in (contrast, before))
    np.testing.assert_allclose(*means, atol=1e-5)
    assert np.any(np.abs(contrast - before) > 1e-3)
    saturation = views_of(images, saturation=0.5)
    np.testing.assert_allclose(luma_of(saturation), before, atol=1e-5)
    assert np.any(np.abs(saturation - np.asarray(images) / 255.0) > 1e-3)


def test_hue_is_shifted_as_in_the_hsv_of_the_standard_library():
    image = np.asarray(IMAGES[0]) / 255.0
    image[0, :4] = [[0.5] * 3, [0.0] * 3, [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    for shift in (-0.4, 0.0, 0.13, 0.5):
        expected = [
            colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)
            for h, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3))
        ]
        found = np.asarray(jax.jit(shift_hue)(jnp.asarray(image), shift)).reshape(-1, 3)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_hue_is_drawn_from_both_sides_for_each_image():
    red = jnp.zeros((300, 4, 4, 3), jnp.uint8).at[..., 0].set(255)
    rngs = jax.random.split(jax.random.PRNGKey(4), 300)
    views = views_of(red, rngs, 4, hue=0.1)[:, 0, 0]
    hues = np.array([(colorsys.rgb_to_hsv(*pixel)[0] + 0.5) % 1 - 0.5 for pixel in views])
    assert (hues.min(), hues.max()) == pytest.approx((-0.1, 0.1), abs=0.005)
    assert abs(hues.mean()) < 0.015


def test_colours_are_jittered_all_or_none_with_a_probability():
    options = {"brightness": 0.4, "saturation": 0.4, "hue": 0.1}
    found = views_of(*copies(300), **options, jitter_probability=0.3)
    assert_a_share_is_changed(found, views_of(*copies(300), **options))


@pytest.mark.parametrize("scale", [0.2, 0.45])
def test_small_crops_are_resized_as_pillow_does(scale):
    side = 32 * np.sqrt(scale)
    image = np.random.default_rng(3).integers(0, 256, (32, 32), np.uint8)
    box = (3.3, 5.7, 3.3 + side, 5.7 + side)  # left, top, right, bottom
    float_image = Image.fromarray(image.astype(np.float32), mode="F")
    expected = np.asarray(float_image.resize((24, 24), Image.Resampling.BILINEAR, box=box))
    pixels = jnp.asarray(image, jnp.float32)[..., None]
    found = np.asarray(crop(pixels, 5.7, 3.3, side, side, size=24))[..., 0]
    np.testing.assert_allclose(found[2:-2, 2:-2], expected[2:-2, 2:-2], atol=0.02)


def test_an_image_is_augmented_alike_alone_and_in_a_batch():
    options = {"crop_scale": (0.3, 1.0), "horizontal_flip": 0.5, "grayscale": 0.2}
    whole = views_of(IMAGES, brightness=0.4, **options)
    alone, other = (
        views_of(IMAGES[i : i + 1], RNGS[j : j + 1], brightness=0.4, **options)[0]
        for i, j in ((3, 3), (0, 1))
    )
    np.testing.assert_allclose(alone, whole[3], atol=1e-6)
    assert np.any(whole[0] != other)
