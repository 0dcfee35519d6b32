"""Data sources in general, and folders of images."""

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hjepa_jax.data.base import Split
from hjepa_jax.data.image_file import decode_image
from hjepa_jax.data.sources import open_source
from hjepa_jax.errors import InputError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def open_here(source, **kwargs):
    return open_source(source, **{"data_dir": None, "image_size": 8, **kwargs})


def random_split(num_images, seed=0, shape=(6, 5, 3)):
    rng = np.random.default_rng(seed)
    return Split(
        rng.integers(256, size=(num_images, *shape), dtype=np.uint8),
        rng.integers(4, size=num_images, dtype=np.int32),
    )


def assert_equal_splits(one, other):
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.labels, other.labels)


def assert_refused(source, rule, value=None, **kwargs):
    """Checks that opening or loading raises one line with the field, the value and the rule."""
    with pytest.raises(InputError) as caught:
        open_here(source, **kwargs).load()
    message = str(caught.value)
    assert message.startswith("data.source=")
    assert repr(value or source) in message
    assert rule in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("source", ["", "imagenet", "tfds:", "npz:", "folder:", "shapes:9", "s3:x"])
def test_unknown_source_is_refused_with_the_kinds(source):
    with pytest.raises(InputError, match=r"npy:<path>, folder:<path>, images:<path> or shapes"):
        open_here(source)


def test_importing_sources_imports_neither_jax_nor_tensorflow():
    code = "import sys, hjepa_jax.data.sources; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"jax", "tensorflow", "tensorflow_datasets"} & {*modules}


def test_shapes_are_created_on_load_with_the_counts_of_info(monkeypatch):
    from hjepa_jax.data import shapes

    asked = []
    monkeypatch.setattr(shapes, "create_shapes", lambda *args: asked.append(args) or args)
    source = open_here("shapes", seed=7)
    assert source.info.image_shape == (32, 32, 3)
    assert len(source.info.class_names) == 10
    assert not asked
    source.load()
    assert asked == [(source.info.num_train, source.info.num_test, 7)] == [(5_000, 2_000, 7)]


def save_image(path, colour=RED, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_folder_holds_out_the_same_tenth_for_every_seed(tmp_path):
    for name, colour in (("cat", RED), ("train", BLUE)):  # this `train` is a class, no split
        for i in range(10):
            save_image(tmp_path / name / f"{i}.png", colour)
    held = []
    for seed in (0, 1):
        source = open_here(f"folder:{tmp_path}", seed=seed)
        assert (source.info.num_train, source.info.num_test) == (18, 2)
        assert source.info.class_names == ("cat", "train")
        assert source.info.image_shape == (8, 8, 3)
        train, test = source.load()
        held.append(test.names)
        assert test.labels.tolist() == [0, 1]
        for split in (train, test):
            colours = np.array([RED, BLUE], np.uint8)[split.labels]
            np.testing.assert_array_equal(split.images[:, 4, 4], colours)
        assert np.bincount([*train.labels, *test.labels]).tolist() == [10, 10]
    assert held[0] == held[1]


def test_files_are_read_in_order_of_their_names(tmp_path):
    names = ["a.JPG", "b.jpeg", "c.Png", "d.webp", "e.BMP", "f.gif"]
    for i, name in enumerate(reversed(names)):
        for split in ("train", "test"):
            save_image(tmp_path / split / "x" / name, (40 * i, 40 * i, 40 * i))
    (tmp_path / "train" / "x" / "._a.jpg").write_text("not an image")
    train, _ = open_here(f"folder:{tmp_path}").load()
    assert train.images.shape == (6, 8, 8, 3)
    assert (np.diff(train.images[:, 4, 4, 0].astype(int)) < -30).all()


def test_the_shorter_side_is_resized_and_the_centre_kept(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = GREEN
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = decode_image(tmp_path / "wide.png", 10)
    assert image.shape == (10, 10, 3)
    np.testing.assert_array_equal(image[:, 1:-1], np.broadcast_to(GREEN, (10, 8, 3)))


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise: the left edge becomes the top
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = (255, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    image = decode_image(tmp_path / "turned.jpg", 8)
    assert image[:3].min() > 200
    assert image[5:].max() < 50


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    Image.new("L", (9, 9), 255).convert(mode).save(tmp_path / "image.tiff")
    np.testing.assert_array_equal(decode_image(tmp_path / "image.tiff", 8), np.uint8(255))


def bitmap_header(side):
    """Returns the header of a bitmap that claims side x side pixels but contains none."""
    fields = 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0
    return b"BM" + struct.pack("<IIIIIIHHIIIIII", *fields)


def encoded(kind, image):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# Content of a file, and the reason given for skipping the file.
BAD = {
    "truncated": (encoded("jpeg", Image.new("RGB", (64, 64), RED))[:400], "Truncated File Read"),
    "empty": (b"", "is none of BMP, GIF"),
    "text": (b"<html>404</html>", "is none of BMP, GIF"),
    "16 bit": (encoded("png", Image.fromarray(np.full((9, 9), 40_000, np.uint16))),
               "more than 8 bits per channel"),
    # Pillow would start Ghostscript to read this.
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
                   "is none of BMP, GIF"),
    "suspected bomb": (bitmap_header(10_000), "10000 x 10000 are more than 89478485 pixels"),
    "bomb": (bitmap_header(40_000), "could be decompression bomb"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_skipped_and_named(tmp_path, capsys, kind):
    colours = {f"x/{2 * i}.png": colour for i, colour in enumerate((RED, BLUE, GREEN))}
    for name, colour in colours.items():
        save_image(tmp_path / name, colour)
    (content, reason), bad = BAD[kind], tmp_path / "x" / "1.png"
    bad.write_bytes(content)
    shown = {}
    for split in open_here(f"folder:{tmp_path}").load():
        shown |= dict(zip(split.names, (tuple(image[0, 0]) for image in split.images), strict=True))
    assert shown == colours
    used, line = capsys.readouterr().err.splitlines()
    assert used == f"folder:{tmp_path}: train 3 files; test 1 files held out, by class; 1 class (x)"
    assert line.startswith(f"folder:{tmp_path}: 1 of 4 files skipped: {bad} ")
    assert reason in line


def test_many_bad_images_are_counted_and_three_are_named(tmp_path, capsys):
    for i in range(2):
        save_image(tmp_path / "train" / "x" / f"{i}.png")
        save_image(tmp_path / "test" / "x" / f"{i}.png")
    for split in ("train", "test"):
        for i in range(5, 9):
            (tmp_path / split / "x" / f"{i}.png").touch()
    source = open_here(f"folder:{tmp_path}")
    assert (source.info.num_train, source.info.num_test) == (6, 6)
    train, test = source.load()
    assert (len(train.images), len(test.images)) == (len(train.labels), len(test.labels)) == (2, 2)
    _, line = capsys.readouterr().err.splitlines()
    assert "8 of 12 files skipped" in line
    assert line.count("is none of") == 3
    assert "; and 5 more" in line


def test_links_out_of_the_folder_are_not_followed(tmp_path, capsys):
    root = tmp_path / "photos"
    for i in range(2):
        save_image(root / "x" / f"{i}.png")
    save_image(tmp_path / "private.png")
    (root / "x" / "in.png").symlink_to(root / "x" / "0.png")
    (root / "x" / "out.png").symlink_to(tmp_path / "private.png")
    (root / "y").symlink_to(root / "x")
    source = open_here(f"folder:{root}")
    assert source.info.num_train + source.info.num_test == 6
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "; not used: 2 link out of the folder (x/out.png, y/out.png)" in line
    (tmp_path / "link").symlink_to(root)  # the folder itself may be a link
    assert open_here(f"folder:{tmp_path}/link").info == source.info

    (root / "y").unlink()
    (tmp_path / "elsewhere").mkdir()
    (root / "x" / "0.png").rename(tmp_path / "elsewhere" / "0.png")
    (root / "y").symlink_to(tmp_path / "elsewhere")
    assert_refused(
        f"folder:{root}", f"no image in {root}/y (it is a link out of the folder; data.follow_links"
    )


@pytest.mark.parametrize("split", ["train", "test", "."])
def test_a_class_without_readable_images_is_refused(tmp_path, split, capsys):
    for folder in ("train", "test") if split != "." else (".",):
        for name in ("x", "y"):
            for i in range(2):
                save_image(tmp_path / folder / name / f"{i}.png")
    for bad in (tmp_path / split / "y").iterdir():
        bad.write_text("not an image")
    bad = tmp_path / split / "y" / "0.png"
    message = assert_refused(f"folder:{tmp_path}", "there is no image left in class y")
    assert f"({bad} cannot be decoded as an image" in message
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_larger_than_memory_is_refused(tmp_path, monkeypatch):
    for i in range(5):
        save_image(tmp_path / "x" / f"{i}.png")
    monkeypatch.setattr("hjepa_jax.data.base.MAX_RESIDENT_BYTES", 5 * 8 * 8 * 3 - 1)
    open_here(f"folder:{tmp_path}").load()  # four training images and one test image fit
    save_image(tmp_path / "x" / "5.png")
    assert_refused(f"folder:{tmp_path}", "must fit the device")


@pytest.mark.parametrize("kind", ["folder", "npz"])
@pytest.mark.parametrize("path", ["absent", "a\0b", "~nobody.at.all/x", "a" * 300, "loop", "pipe"])
def test_a_path_that_cannot_be_followed_is_refused(tmp_path, monkeypatch, kind, path):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    os.mkfifo("pipe")
    assert_refused(f"{kind}:{path}", "")


def test_files_that_may_hold_several_images_are_counted(tmp_path, capsys):
    for name in ("0.gif", "1.TIF", "2.png"):
        save_image(tmp_path / "x" / name)
    open_here(f"folder:{tmp_path}")
    line = capsys.readouterr().err
    assert line.endswith("; 2 GIF or TIFF files: only the first image of each is used\n")
