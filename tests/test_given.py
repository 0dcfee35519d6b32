"""Images from users are all prepared in the same way, or an error names the fault."""

import numpy as np
import pytest
from PIL import Image

from hjepa_jax.data.given import GivenImages, as_stored, images_of
from hjepa_jax.data.records import Decoded
from hjepa_jax.errors import InputError

RNG = np.random.default_rng(0)
SIZES = [(8, 8), (20, 8), (8, 30), (31, 17), (200, 300), (5, 7)]


def photo(height: int, width: int) -> np.ndarray:
    small = Image.fromarray(RNG.integers(256, size=(3, 3, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def read(item, size=8):
    return GivenImages([item], size).read(0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_files_and_arrays_give_the_same_pixels(tmp_path, height, width):
    image = photo(height, width)
    Image.fromarray(image).save(tmp_path / "photo.png")
    expected = read(tmp_path / "photo.png")
    assert expected.shape == (8, 8, 3)
    for item in (str(tmp_path / "photo.png"), image, image / 255.0, image.astype("f4") / 255):
        np.testing.assert_array_equal(read(item), expected)


def test_a_photo_is_cropped_not_squeezed():
    """A disk stays round: the crop keeps the bright middle square and removes both black bars."""
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 200
    assert read(image).min() > 150  # if squeezed, 5 of 8 columns would be black


def test_grey_images_fill_three_channels():
    grey = photo(8, 8)[..., 0]
    for item in (grey, grey[..., None], grey / 255.0):
        np.testing.assert_array_equal(read(item), np.repeat(grey[..., None], 3, axis=2))


def test_the_dtype_sets_the_pixel_range_not_the_values():
    dark = np.ones((8, 8, 3), np.uint8)
    assert as_stored(dark).max() == 1
    assert as_stored(dark.astype(np.float32)).min() == 255


IMAGE = (8, 8, 3)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(IMAGE, np.int8), ["int8[8, 8, 3]", "must be uint8, uint16, or floats in [0, 1]"]),
        (np.zeros(IMAGE, np.int64), ["int64[8, 8, 3]", "must be uint8"]),
        (np.zeros(IMAGE, bool), ["bool[8, 8, 3]", "must be uint8"]),
        (np.zeros(IMAGE, complex), ["complex128", "must be uint8"]),
        (np.full(IMAGE, 255.0), ["float64", "[0, 1], these lie in [255, 255]"]),
        (np.full(IMAGE, -0.1), ["these lie in [-0.1, -0.1]"]),
        (np.full(IMAGE, 1.001, np.float16), ["float16", "these lie in"]),
        (np.full(IMAGE, np.nan), ["these lie in [nan, nan]"]),
        (np.zeros((8, 8, 4), np.uint8), ["uint8[8, 8, 4]", "[H, W, 3], [H, W, 1] or [H, W]"]),
        (np.zeros((0, 8, 3), np.uint8), ["uint8[0, 8, 3]", "must not be empty"]),
    ],
    ids=range(10),
)
def test_other_arrays_are_refused(array, words):
    with pytest.raises(InputError, match=r"^images=") as caught:
        read(array)
    assert not [word for word in words if word not in str(caught.value)]


def test_batch_image_and_path_are_told_apart():
    batch = RNG.integers(256, size=(5, 8, 9, 3), dtype=np.uint8)
    shapes = lambda images: [np.shape(item) for item in images_of(images)]
    assert shapes(batch) == [(8, 9, 3)] * 5
    assert shapes(batch[0]) == [(8, 9, 3)]
    assert shapes(batch[0, ..., 0]) == [(8, 9)]
    assert shapes(batch[..., :1]) == [(8, 9, 1)] * 5
    assert shapes([batch[0], batch[1, :4]]) == [(8, 9, 3), (4, 9, 3)]
    assert images_of("a.png") == ["a.png"]


@pytest.mark.parametrize(
    "images",
    [3, [1, 2], np.zeros(3, np.uint8), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((1,) * 5), None,
     *(np.zeros(shape, np.uint8) for shape in ((8, 8, 4), (3, 8, 9), (1, 8, 9), (5, 8, 9))),
     [[[1, 2], [3]]], Image.new("RGB", (4, 4)), [Image.new("P", (4, 4))], b"a.png", {"a": 1}],
)  # fmt: skip
def test_other_values_than_images_are_refused(images):
    with pytest.raises(InputError, match=r"^images="):
        images_of(images)


def test_a_file_without_an_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no")
    for path in (tmp_path / "a.png", tmp_path / "nowhere.png"):
        with pytest.raises(InputError, match=rf"^images='{path}': cannot be decoded"):
            read(path)


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(photo(8, 8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read("~/a.png"), read(tmp_path / "a.png"))


def test_images_are_decoded_on_access(tmp_path):
    (tmp_path / "broken.png").write_text("no")
    items = [photo(8, 8), str(tmp_path / "broken.png"), photo(9, 9)]
    decoded = Decoded(GivenImages(items, 8))
    assert len(decoded) == 3
    np.testing.assert_array_equal(decoded[0:1], items[0][None])
    assert not decoded.errors
    black = decoded[1:5]
    assert black.shape == (2, 8, 8, 3)
    assert not black[0].any()
    assert list(decoded.errors) == [1]
    with pytest.raises(InputError, match="broken"):
        Decoded(GivenImages(items, 8), stop_at_error=True)[0:3]


def test_images_of_different_types_are_refused_together():
    both = GivenImages([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint16)], 8)
    with pytest.raises(InputError, match=r"^images='uint16 and uint8': must all have one type"):
        _ = Decoded(both)[0:2]
