import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hjepa_jax import run
from hjepa_jax.config import base_config
from hjepa_jax.data import sources
from hjepa_jax.data.fingerprint import fingerprint
from hjepa_jax.data.folder_source import decode_image
from hjepa_jax.data.sources import Split, open_source, save_npz
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
    """Opening or loading names the field, the value and the rule, in one line."""
    with pytest.raises(InputError) as caught:
        open_here(source, **kwargs).load()
    message = str(caught.value)
    assert message.startswith("data.source=")
    assert repr(value or source) in message
    assert rule in message
    assert "\n" not in message
    return message


# Any source


@pytest.mark.parametrize("source", ["", "imagenet", "tfds:", "npz:", "folder:", "shapes:9", "s3:x"])
def test_unknown_source_is_refused_with_the_kinds(source):
    with pytest.raises(InputError, match=r"tfds:<name>, npz:<file>, folder:<path> or shapes"):
        open_here(source)


def test_importing_sources_imports_neither_jax_nor_tensorflow():
    code = "import sys, hjepa_jax.data.sources; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"jax", "tensorflow", "tensorflow_datasets"} & {*modules}


def test_shapes_info_is_what_load_returns(monkeypatch):
    from hjepa_jax.data import shapes

    asked = []
    monkeypatch.setattr(shapes, "create_shapes", lambda *args: asked.append(args) or args)
    source = open_here("shapes", seed=7)
    assert source.info.image_shape == (32, 32, 3)
    assert len(source.info.class_names) == 10
    assert not asked
    source.load()
    assert asked == [(source.info.num_train, source.info.num_test, 7)] == [(5_000, 2_000, 7)]


# npz


def test_npz_comes_back_as_saved(tmp_path):
    train, test = random_split(12), random_split(5, seed=1)
    save_npz(tmp_path / "data.npz", train, test)
    source = open_here(f"npz:{tmp_path}/data.npz")
    assert (source.info.num_train, source.info.num_test) == (12, 5)
    assert source.info.image_shape == (6, 5, 3)
    assert source.info.class_names == ("0", "1", "2", "3")
    for saved, loaded in zip((train, test), source.load(), strict=True):
        assert_equal_splits(saved, loaded)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1)])
def test_npz_grey_values_fill_three_channels(tmp_path, shape):
    grey = np.arange(60, dtype=np.uint8).reshape(2, 6, 5)
    arrays = {"images": grey.reshape(2, *shape), "labels": np.array([0, 1])}
    both = {f"{split}_{key}": a for split in ("train", "test") for key, a in arrays.items()}
    np.savez(tmp_path / "grey.npz", **both)
    train, _ = open_here(f"npz:{tmp_path}/grey.npz").load()
    np.testing.assert_array_equal(train.images, np.stack([grey] * 3, axis=-1))


def test_npz_without_test_pair_holds_out_the_same_tenth_for_every_seed(tmp_path):
    split = random_split(50)
    split.images[:, 0, 0, 0] = np.arange(50)  # each image carries its index
    np.savez(tmp_path / "data.npz", train_images=split.images, train_labels=split.labels)
    held = []
    for seed in (0, 1):
        train, test = open_here(f"npz:{tmp_path}/data.npz", seed=seed).load()
        train_index, test_index = train.images[:, 0, 0, 0], test.images[:, 0, 0, 0]
        assert len(test_index) == 5
        assert sorted([*train_index, *test_index]) == list(range(50))
        np.testing.assert_array_equal(train.labels, split.labels[train_index])
        np.testing.assert_array_equal(test.labels, split.labels[test_index])
        assert set(test.labels) == {0, 1, 2, 3}
        held.append(test_index.tolist())
    assert held[0] == held[1]


GOOD = {"train_images": np.zeros((4, 6, 5, 3), np.uint8), "train_labels": np.array([0, 1, 0, 1])}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"train_labels": None}, "must hold the arrays"),
        ({"test_images": GOOD["train_images"]}, "holds test_images, but not images and labels"),
        ({"x_train": GOOD["train_images"]}, "once, not train_images and x_train"),
        ({"train_images": None, "x": GOOD["train_images"]}, "must hold the arrays"),
        ({"train_images": np.zeros((4, 6, 5, 3), np.float32)}, "train_images must be uint8"),
        ({"train_images": np.zeros((4, 6, 5, 4), np.uint8)}, "train_images must be [n, H, W, 3]"),
        ({"train_images": np.zeros((4, 6), np.uint8)}, "train_images must be [n, H, W, 3]"),
        ({"train_images": np.zeros((0, 6, 5, 3), np.uint8)}, "train_images must not be empty"),
        ({"train_images": np.zeros((4, 6, 5, 3), np.int64)}, "train_images must be uint8"),
        ({"train_labels": np.array(["a", "b", "a", "b"])}, "train_labels must be integers"),
        ({"train_labels": np.arange(4) / 2}, "train_labels must hold one label per image: whole"),
        ({"train_labels": np.array([0, 1, 0, np.nan])}, "train_labels must hold one label per"),
        ({"train_labels": np.array([0, 1, 0, np.inf])}, "train_labels must hold one label per"),
        ({"train_labels": np.full(4, 1e30)}, "train_labels must lie in [0, 65535]"),
        ({"train_labels": np.full(4, -1e30)}, "train_labels must lie in [0, 65535]"),
        ({"train_labels": np.arange(5)}, "train_labels must hold one label per image"),
        ({"train_labels": np.ones((4, 2), int)}, "or one-hot rows"),
        ({"train_labels": np.zeros((4, 2), int)}, "or one-hot rows"),
        ({"train_labels": np.zeros((4, 0), int)}, "or one-hot rows"),
        ({"train_labels": np.zeros((4, 2, 2), int)}, "or one-hot rows"),
        ({"train_labels": np.arange(4)}, "no class has two images"),
        ({"train_labels": np.arange(4) - 1}, "train_labels must lie in [0, 65535]"),
        ({"train_labels": np.array([0, 1, 2, 2**40])}, "train_labels must lie in [0, 65535]"),
        ({"train_labels": np.array([None] * 4)}, "train_labels must be integers"),
        (
            {"test_images": np.zeros((2, 5, 6, 3), np.uint8), "test_labels": np.arange(2)},
            "train and test images differ in shape",
        ),
        (
            {"test_images": np.zeros((2, 6, 5, 3), np.uint8), "test_labels": np.arange(3)},
            "test_labels must hold one label per image",
        ),
        (
            {"train_images": GOOD["train_images"][:1], "train_labels": np.arange(1)},
            "one image cannot be split",
        ),
    ],
)
def test_npz_that_breaks_a_rule_is_refused(tmp_path, change, rule):
    arrays = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    assert_refused(f"npz:{tmp_path}/bad.npz", rule)


def damage(path, content):
    good = path.read_bytes()
    match content:
        case "absent":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("<html>404</html>")
        case "npy":
            with path.open("wb") as file:
                np.save(file, np.zeros(3))
        case "truncated":
            path.write_bytes(good[: len(good) // 2])
        case "flipped":
            path.write_bytes(good[:300] + bytes([good[300] ^ 255]) + good[301:])
        case "folder":
            path.unlink()
            path.mkdir()


@pytest.mark.parametrize(
    "content", ["absent", "empty", "text", "npy", "truncated", "flipped", "folder"]
)
def test_npz_that_cannot_be_read_is_refused(tmp_path, content):
    path = tmp_path / "bad.npz"
    save_npz(path, random_split(12), random_split(12))
    damage(path, content)
    assert_refused(f"npz:{path}", "must name a readable .npz file")


def write_npz(path, headers, data=b"\0" * 1000):
    """An npz file whose arrays are said to be what `headers` (name, literal dict) say."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, header in headers:
            text = header.encode().ljust(200) + b"\n"
            magic = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text))
            archive.writestr(f"{name}.npy", magic + text + data)


def header(shape, dtype="|u1"):
    return f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}"


LABELS = ("train_labels", header("(4,)"))


@pytest.mark.parametrize(
    ("headers", "rule"),
    [
        ([("train_images", header("(99999, 999, 999, 3)")), LABELS], "this is 278.8 GiB"),
        ([("train_images", header("(1, 99999999, 9, 3)")), LABELS], "is shorter than its shape"),
        ([("train_images", header(f"({2**32}, {2**32})")), LABELS], "GiB"),
        ([("train_images", header("(-4, -2, 2, 3)")), LABELS], "must name a readable .npz"),
        ([("train_images", header("((9,),)")), LABELS], "must name a readable .npz"),
        ([("train_images", "(" * 190), LABELS], "must name a readable .npz"),
        ([("train_images", header("(4, 2, 2, 3)", "|O")), LABELS], "train_images must be uint8"),
        ([("train_images", header("(4, 2, 2, 3)")), LABELS, LABELS], "must hold the arrays"),
        ([("train_images", header("(4, 2, 2, 3)")), ("train_labels", header("(99999999,)"))],
         "is shorter than its shape"),
        ([("train_images", header("(4, 2, 2, 3)")), ("train_labels", header("(4,)", "<m8[s]"))],
         "labels must be integers"),
    ],
)  # fmt: skip
def test_npz_whose_headers_lie_is_refused_before_room_is_made(tmp_path, headers, rule):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of the duplicate name
        write_npz(tmp_path / "bad.npz", headers)
    assert_refused(f"npz:{tmp_path}/bad.npz", rule)


def test_grey_images_that_are_too_large_as_rgb_are_refused(tmp_path, monkeypatch):
    write_npz(tmp_path / "grey.npz", [("train_images", header("(4, 15, 15)")), LABELS])
    monkeypatch.setattr(sources, "MAX_RESIDENT_BYTES", 3 * 900 - 1)
    assert_refused(f"npz:{tmp_path}/grey.npz", "must fit the device as uint8")


# folder


def save_image(path, colour=RED, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_folder_without_test_images_holds_out_the_same_tenth_for_every_seed(tmp_path):
    for name, colour in (("cat", RED), ("dog", BLUE)):
        for i in range(10):
            save_image(tmp_path / name / f"{i}.png", colour)
    held = []
    for seed in (0, 1):
        source = open_here(f"folder:{tmp_path}", seed=seed)
        assert (source.info.num_train, source.info.num_test) == (18, 2)
        assert source.info.class_names == ("cat", "dog")
        assert source.info.image_shape == (8, 8, 3)
        train, test = source.load()
        held.append(test.names)
        assert test.labels.tolist() == [0, 1]
        for split in (train, test):
            colours = np.array([RED, BLUE], np.uint8)[split.labels]
            np.testing.assert_array_equal(split.images[:, 4, 4], colours)
        assert np.bincount([*train.labels, *test.labels]).tolist() == [10, 10]
    assert held[0] == held[1]


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_takes_its_own_test_images(tmp_path, test_name):
    for split, colour in (("train", RED), (test_name, GREEN)):
        for name in ("b", "a"):
            save_image(tmp_path / split / name / "0.bmp", colour)
    source = open_here(f"folder:{tmp_path}")
    assert source.info.class_names == ("a", "b")
    train, test = source.load()
    np.testing.assert_array_equal(train.labels, [0, 1])
    np.testing.assert_array_equal(train.images[:, 0, 0], [RED, RED])
    np.testing.assert_array_equal(test.images[:, 0, 0], [GREEN, GREEN])


def test_folder_may_have_a_class_named_train(tmp_path):
    for name in ("car", "plane", "train"):
        for i in range(2):
            save_image(tmp_path / name / f"{i}.png")
    assert open_here(f"folder:{tmp_path}").info.class_names == ("car", "plane", "train")


def test_folder_reads_every_suffix_in_order_and_nothing_hidden(tmp_path):
    names = ["a.JPG", "b.jpeg", "c.Png", "d.webp", "e.BMP", "f.gif"]
    for i, name in enumerate(reversed(names)):
        save_image(tmp_path / "train" / "x" / name, (40 * i, 40 * i, 40 * i))
    save_image(tmp_path / "test" / "x" / "0.png")
    (tmp_path / "train" / "x" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "x" / "._a.jpg").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    train, _ = open_here(f"folder:{tmp_path}").load()
    assert train.images.shape == (6, 8, 8, 3)
    assert (np.diff(train.images[:, 4, 4, 0].astype(int)) < -30).all()


def test_shorter_side_is_resized_and_the_centre_is_kept(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = GREEN
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = decode_image(tmp_path / "wide.png", 10)
    assert image.shape == (10, 10, 3)
    np.testing.assert_array_equal(image[:, 1:-1], np.broadcast_to(GREEN, (10, 8, 3)))


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the left edge becomes the top
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
    """The head of a bitmap that promises side x side pixels and holds none."""
    fields = 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0
    return b"BM" + struct.pack("<IIIIIIHHIIIIII", *fields)


def make_bad(path, kind):
    match kind:
        case "truncated":
            save_image(path, size=(64, 64))
            path.write_bytes(path.read_bytes()[:400])
        case "empty":
            path.touch()
        case "text":
            path.write_text("<html>404</html>")
        case "16 bit":
            Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path)
        case "postscript":  # Pillow would start Ghostscript
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
        case "suspected bomb":
            assert Image.MAX_IMAGE_PIXELS < 10_000**2 < 2 * Image.MAX_IMAGE_PIXELS
            path.write_bytes(bitmap_header(10_000))
        case "bomb":
            path.write_bytes(bitmap_header(40_000))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "Truncated File Read"),
        ("empty", "is none of BMP, GIF"),
        ("text", "is none of BMP, GIF"),
        ("16 bit", "more than 8 bits per channel"),
        ("postscript", "is none of BMP, GIF"),
        ("suspected bomb", "10000 x 10000 are more than 89478485 pixels"),
        ("bomb", "could be decompression bomb"),
    ],
)
def test_a_bad_image_is_skipped_and_listed_and_the_rest_is_read(tmp_path, capsys, kind, reason):
    for i, colour in enumerate((RED, BLUE, GREEN)):
        save_image(tmp_path / "x" / f"{2 * i}.png", colour)
    bad = tmp_path / "x" / ("1.jpg" if kind == "truncated" else "1.png")
    make_bad(bad, kind)
    train, test = open_here(f"folder:{tmp_path}").load()
    assert sorted([*train.names, *test.names]) == ["x/0.png", "x/2.png", "x/4.png"]
    shown = {name: tuple(image[0, 0]) for split in (train, test)
             for name, image in zip(split.names, split.images, strict=True)}  # fmt: skip
    assert shown == {"x/0.png": RED, "x/2.png": BLUE, "x/4.png": GREEN}
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


def test_links_out_of_the_folder_are_skipped_and_those_within_are_read(tmp_path, capsys):
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
    (tmp_path / "link").symlink_to(root)  # the folder itself may be reached by a link
    assert open_here(f"folder:{tmp_path}/link").info == source.info

    (root / "y").unlink()
    (tmp_path / "elsewhere").mkdir()
    (root / "x" / "0.png").rename(tmp_path / "elsewhere" / "0.png")
    (root / "y").symlink_to(tmp_path / "elsewhere")
    assert_refused(f"folder:{root}", f"no image in {root}/y (it is a link out of the folder)")


@pytest.mark.parametrize("split", ["train", "test", "."])
def test_a_class_of_which_no_image_is_left_is_refused(tmp_path, split, capsys):
    for folder in ("train", "test") if split != "." else (".",):
        for name in ("x", "y"):
            for i in range(2):
                save_image(tmp_path / folder / name / f"{i}.png")
    for bad in (tmp_path / split / "y").iterdir():
        bad.write_text("not an image")
    bad = tmp_path / split / "y" / "0.png"
    message = assert_refused(f"folder:{tmp_path}", "there is no image left in class y")
    assert f"({bad} cannot be decoded as an image" in message
    assert capsys.readouterr().err.count("\n") == 1  # of what is used; the error says the rest


def test_one_image_that_is_left_cannot_be_split(tmp_path):
    save_image(tmp_path / "x" / "0.png")
    (tmp_path / "x" / "1.png").touch()
    assert_refused(f"folder:{tmp_path}", "one image cannot be split")


def test_a_folder_too_large_for_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    for i in range(5):
        save_image(tmp_path / "x" / f"{i}.png")
    monkeypatch.setattr(sources, "MAX_RESIDENT_BYTES", 5 * 8 * 8 * 3 - 1)
    open_here(f"folder:{tmp_path}").load()  # four and one
    save_image(tmp_path / "x" / "5.png")
    assert_refused(f"folder:{tmp_path}", "must fit the device as uint8")


@pytest.mark.parametrize("kind", ["folder", "npz"])
@pytest.mark.parametrize("path", ["a\0b", "~nobody.at.all/x", "a" * 300, "loop", "pipe"])
def test_a_path_that_cannot_be_followed_is_refused(tmp_path, monkeypatch, kind, path):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    os.mkfifo("pipe")
    assert_refused(f"{kind}:{path}", "")


@pytest.mark.parametrize(
    ("files", "rule"),
    [
        ([], "must hold one sub-folder per class"),
        (["0.png"], "must hold one sub-folder per class"),
        (["train/0.png", "test/0.png"], "must hold one sub-folder per class"),
        (["x/0.png"], "one image cannot be split"),
        (["x/0.png", "y/notes.txt"], "there is no image in"),
        (["train/x/0.png", "test/y/0.png"], "must have the same classes"),
        (["train/x/0.png", "test/0.png"], "must hold one sub-folder per class"),
    ],
)
def test_folder_that_breaks_a_rule_is_refused(tmp_path, files, rule):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch() if file.endswith("txt") else save_image(tmp_path / file)
    assert_refused(f"folder:{tmp_path}", rule)


def test_folder_that_does_not_exist_is_refused(tmp_path):
    assert_refused(f"folder:{tmp_path}/absent", "must name a folder that exists")


# tfds


@pytest.fixture
def dead_cifar10(monkeypatch):
    """Points the download of CIFAR-10 to a port of this machine, by default a closed one."""
    import tensorflow_datasets as tfds

    def point_to(port):
        url = f"http://127.0.0.1:{port}/cifar-10.tar.gz"
        monkeypatch.setattr(tfds.builder_cls("cifar10"), "url_infos", {url: None})

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    point_to(port)
    return point_to


def assert_download_refused(data_dir, reason, caplog):
    start = time.perf_counter()
    message = assert_refused("tfds:cifar10", reason, data_dir=str(data_dir))
    assert time.perf_counter() - start < 15
    for advice in ("127.0.0.1", "--config.data.dir", "configs/shapes_tiny.py"):
        assert advice in message
    assert not caplog.records
    assert not list(data_dir.iterdir())


def test_dead_network_is_one_message_within_15_seconds(tmp_path, dead_cifar10, caplog):
    assert_download_refused(tmp_path, "Connection refused", caplog)


def test_a_dry_run_downloads_nothing(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def download(*_args, **_kwargs):
        raise AssertionError("a dry run asked for a download")

    monkeypatch.setattr(tfds.builder_cls("cifar10"), "download_and_prepare", download)
    config = base_config()
    config.data.dir = str(tmp_path)
    with pytest.raises(InputError, match=r"nothing is downloaded here; point --config"):
        run.describe(config)
    assert not list(tmp_path.iterdir())


def test_silent_host_is_given_up(tmp_path, dead_cifar10, monkeypatch, caplog):
    from hjepa_jax.data import tfds_source

    monkeypatch.setattr(tfds_source, "PROBE_SEC", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dead_cifar10(silent.getsockname()[1])
        assert_download_refused(tmp_path, "no answer within 0.5 s", caplog)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("no_such_set", "Dataset no_such_set not found"),
        ("cifar10:9.9.9", "cannot be loaded at version 9.9.9"),
        ("../cifar10", "Parsing builder name string ../cifar10 failed"),
    ],
)
def test_unknown_tfds_name_is_refused(tmp_path, name, rule):
    assert_refused(f"tfds:{name}", rule, data_dir=str(tmp_path))


def define_tiny_set(name, splits, image_shape, labels=("x", "y")):
    """Registers a TFDS set whose image i is 4 + i pixels wide where width varies, and filled."""
    import tensorflow_datasets as tfds

    def info(self):
        features = {
            "image": tfds.features.Image(shape=image_shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=labels) if labels else np.int32,
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def examples(self, num_examples):
        height, width, channels = image_shape
        for i in range(num_examples):
            image = np.full((height or 4, width or 4 + i, channels), 10 * i, np.uint8)
            yield i, {"image": image, "label": i % 2}

    members = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": lambda self, _: {k: self._generate_examples(n) for k, n in splits},
        "_generate_examples": examples,
        "pkg_dir_path": Path(__file__).parent,
    }
    type(name, (tfds.core.GeneratorBasedBuilder,), {"__module__": __name__, **members})


def test_tfds_images_of_varying_size_are_cropped_and_validation_stands_in_for_test(tmp_path):
    define_tiny_set("TinyVarying", [("train", 6), ("validation", 3)], (None, None, 3))
    source = open_here("tfds:tiny_varying", data_dir=str(tmp_path))
    assert (source.info.num_train, source.info.num_test) == (6, 3)
    assert source.info.image_shape == (8, 8, 3)
    train, test = source.load()
    assert train.images.shape == (6, 8, 8, 3)
    assert sorted(train.images[:, 0, 0, 0]) == [0, 10, 20, 30, 40, 50]
    np.testing.assert_array_equal(train.labels, train.images[:, 0, 0, 0] // 10 % 2)
    assert len(test.labels) == 3


def test_tfds_grey_images_of_varying_size_become_rgb(tmp_path):
    define_tiny_set("TinyGreyVarying", [("train", 2), ("test", 1)], (None, None, 1))
    train, _ = open_here("tfds:tiny_grey_varying", data_dir=str(tmp_path)).load()
    assert train.images.shape == (2, 8, 8, 3)
    assert sorted(train.images[:, 7, 7, 2]) == [0, 10]


def test_tfds_grey_values_fill_three_channels_and_a_tenth_stands_in_for_test(tmp_path):
    define_tiny_set("TinyGrey", [("train", 20)], (4, 6, 1))
    source = open_here("tfds:tiny_grey", data_dir=str(tmp_path))
    assert (source.info.num_train, source.info.num_test) == (18, 2)
    assert source.info.image_shape == (4, 6, 3)
    train, test = source.load()
    assert (train.images.shape, test.images.shape) == ((18, 4, 6, 3), (2, 4, 6, 3))
    values = [*train.images[:, 0, 0, 2], *test.images[:, 0, 0, 2]]
    assert sorted(values) == list(range(0, 200, 10))


def test_tfds_images_are_decoded_once_until_they_are_prepared_anew(tmp_path, monkeypatch):
    from hjepa_jax.data import tfds_source

    define_tiny_set("TinyKept", [("train", 6), ("test", 3)], (4, 4, 3))
    decoded, read = [], tfds_source._read_split
    monkeypatch.setattr(
        tfds_source, "_read_split", lambda *args: decoded.append(args[2]) or read(*args)
    )
    load = lambda: open_here("tfds:tiny_kept", data_dir=str(tmp_path)).load()
    first, again = load(), load()
    assert decoded == ["train", "test"]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert (other.images.dtype, other.labels.dtype) == (np.uint8, np.int32)
    (path, *_) = (tmp_path / "tiny_kept" / "1.0.0").glob("*train*")
    os.utime(path, (0, 0))
    load()
    assert decoded == ["train", "test"] * 2


@pytest.mark.parametrize(
    ("name", "splits", "labels"),
    [("TinyTest", [("test", 2)], ("x", "y")), ("TinyTarget", [("train", 2)], None)],
)
def test_tfds_set_that_is_not_image_classification_is_refused(tmp_path, name, splits, labels):
    define_tiny_set(name, splits, (4, 4, 3), labels)
    snake = name[:4].lower() + "_" + name[4:].lower()
    assert_refused(f"tfds:{snake}", "must be an image classification set", data_dir=str(tmp_path))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder in which TFDS has prepared a set of its own."""
    define_tiny_set("TinyDamaged", [("train", 6), ("test", 3)], (4, 4, 3))
    data_dir = tmp_path_factory.mktemp("prepared")
    open_here("tfds:tiny_damaged", data_dir=str(data_dir))
    return data_dir


@pytest.mark.parametrize(
    ("file", "damage", "rule"),
    [
        ("*train*", lambda data: data[: len(data) // 2], "split train in"),
        ("*train*", lambda data: data[:60] + b"\0" * 9 + data[69:], "split train in"),
        ("*train*", lambda _: b"", "6 elements but contained only 0"),
        ("dataset_info.json", lambda data: data[:-9], "Failed to load JSON"),
    ],
    ids=["cut off", "other bytes", "empty", "description"],
)
def test_damaged_prepared_data_is_refused_in_one_line(tmp_path, prepared, file, damage, rule):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / "tiny_damaged" / "1.0.0").glob(file)
    path.write_bytes(damage(path.read_bytes()))
    assert_refused("tfds:tiny_damaged", rule, data_dir=str(tmp_path))


@pytest.fixture(scope="module")
def cifar10():
    if "TFDS_DATA_DIR" not in os.environ:
        pytest.skip("TFDS_DATA_DIR names no folder with prepared data")
    source = open_here("tfds:cifar10", data_dir=os.environ["TFDS_DATA_DIR"])
    return source, *source.load()


def test_cifar10_has_its_counts_and_class_names(cifar10):
    source, train, test = cifar10
    assert (source.info.num_train, source.info.num_test) == (50_000, 10_000)
    assert source.info.image_shape == (32, 32, 3)
    assert source.info.class_names[:3] == ("airplane", "automobile", "bird")
    assert train.images.shape == (50_000, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10


def test_cifar10_channel_means_are_those_of_the_set(cifar10):
    _, train, _ = cifar10
    # The usual 0.491 0.482 0.447 to within what a lossy copy may change.
    means = train.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.489, 0.482, 0.444], atol=0.004)


def test_cifar10_comes_in_the_same_order_every_time(cifar10):
    source, _, test = cifar10
    assert fingerprint(source.load()[1]) == fingerprint(test)
