"""npz sources: common array names, refused files, memory."""

import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from hjepa_jax.data.npz import save_npz
from hjepa_jax.data.sources import open_source
from tests.test_sources import assert_equal_splits, assert_refused, open_here, random_split

RNG = np.random.default_rng(0)
TRAIN, TEST, VAL = (RNG.integers(256, size=(n, 4, 6, 3), dtype=np.uint8) for n in (10, 4, 6))
LABELS = {10: np.arange(10) % 2, 4: np.arange(4) % 2, 6: np.arange(6) % 2}


def opened(tmp_path, arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return open_source(f"npz:{tmp_path}/data.npz", data_dir=None, image_size=4)


def pair(images, names):
    return dict(zip(names.split(), (images, LABELS[len(images)]), strict=True))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train_images train_labels", "test_images test_labels"),
        ("x_train y_train", "x_test y_test"),  # Keras
        ("X_train y_train", "X_test y_test"),
        ("Xtrain ytrain", "Xtest ytest"),
        ("train_x train_y", "test_x test_y"),
        ("TRAIN_IMAGES TRAIN_LABELS", "TEST_IMAGES TEST_LABELS"),
        ("train-data train-targets", "testing-data testing-targets"),
        ("images labels", "test_images test_labels"),
        ("x y", "val_x val_y"),
        ("training_images training_labels", "valid_images valid_labels"),
        ("x_train y_train", "x_validation y_validation"),
    ],
)
def test_common_array_names_are_known(tmp_path, capsys, train, test):
    source = opened(tmp_path, {**pair(TRAIN, train), **pair(TEST, test)})
    for split, images in zip(source.load(), (TRAIN, TEST), strict=True):
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, LABELS[len(images)])
    assert capsys.readouterr().err == (
        f"npz:{tmp_path}/data.npz: train 10 images in {train.split()[0]}; "
        f"test 4 images in {test.split()[0]}; 2 classes (0, 1)\n"
    )


def test_medmnist_is_read_and_unused_arrays_are_named(tmp_path, capsys):
    arrays = {}
    for name, images in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        labels = LABELS[len(images)][:, None].astype(np.uint8)
        arrays |= {f"{name}_images": images, f"{name}_labels": labels}
    arrays |= {"x": np.zeros(3), "notes": np.array(["text"]), "pickled": np.array([None])}
    train, test = opened(tmp_path, arrays).load()
    np.testing.assert_array_equal(test.images, TEST)
    assert train.labels.tolist() == LABELS[10].tolist()
    line = capsys.readouterr().err
    assert "not used: 5 other arrays (val_images, val_labels, x, ...)" in line


@pytest.mark.parametrize(
    "labels",
    [
        LABELS[10][:, None],
        LABELS[10][:, None, None],
        LABELS[10].astype(np.float32),
        LABELS[10].astype(bool),
        np.eye(2)[LABELS[10]],
        np.eye(2, dtype=bool)[LABELS[10]],
        np.asfortranarray(np.eye(2, dtype=np.uint8)[LABELS[10]]),
        LABELS[10].astype(">u8"),
    ],
)
def test_labels_may_be_columns_one_hot_or_whole_floats(tmp_path, labels):
    train, test = opened(
        tmp_path, {"x_train": TRAIN, "y_train": labels, **pair(TEST, "x_test y_test")}
    ).load()
    assert train.labels.dtype == np.int32
    assert train.labels.tolist() == LABELS[10].tolist()
    assert test.labels.tolist() == LABELS[4].tolist()


def test_arrays_in_fortran_order_are_read(tmp_path):
    arrays = {"x_train": np.asfortranarray(TRAIN), "y_train": LABELS[10]}
    train, _ = opened(tmp_path, {**arrays, **pair(TEST, "x_test y_test")}).load()
    np.testing.assert_array_equal(train.images, TRAIN)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_reading_makes_no_second_copy_of_the_images(tmp_path, channels):
    images = np.zeros((30_000, 32, 32, *channels), np.uint8)
    images.reshape(30_000, -1)[:, 0] = np.arange(30_000) % 251
    path = tmp_path / "data.npz"
    np.savez(path, images=images, labels=np.arange(30_000) % 10)
    del images
    tracemalloc.start()
    try:
        train, test = open_source(f"npz:{path}", data_dir=None, image_size=32).load()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    decoded = 30_000 * 32 * 32 * 3
    assert peak < 1.1 * decoded + 2 * 2**24 + 2**22  # a tenth for the test, and two blocks
    first = np.concatenate([train.images[:, 0, 0, 0], test.images[:, 0, 0, 0]])
    assert np.array_equal(np.bincount(first), np.bincount(np.arange(30_000) % 251))


def test_half_of_a_validation_set_is_not_used(tmp_path, capsys):
    arrays = {**pair(TRAIN, "train_images train_labels"), "val_labels": LABELS[4]}
    train, test = opened(tmp_path, arrays).load()
    assert [len(train.labels), len(test.labels)] == [9, 1]
    assert "not used: 1 other arrays (val_labels)" in capsys.readouterr().err


def test_a_saved_file_comes_back_equal(tmp_path):
    train, test = random_split(12), random_split(5, seed=1)
    save_npz(tmp_path / "data.npz", train, test)
    source = open_here(f"npz:{tmp_path}/data.npz")
    assert (source.info.num_train, source.info.num_test) == (12, 5)
    assert source.info.image_shape == (6, 5, 3)
    assert source.info.class_names == ("0", "1", "2", "3")
    for saved, loaded in zip((train, test), source.load(), strict=True):
        assert_equal_splits(saved, loaded)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1)])
def test_grey_values_fill_three_channels(tmp_path, shape):
    grey = np.arange(60, dtype=np.uint8).reshape(2, 6, 5)
    arrays = {"images": grey.reshape(2, *shape), "labels": np.array([0, 1])}
    both = {f"{split}_{key}": a for split in ("train", "test") for key, a in arrays.items()}
    np.savez(tmp_path / "grey.npz", **both)
    train, _ = open_here(f"npz:{tmp_path}/grey.npz").load()
    np.testing.assert_array_equal(train.images, np.stack([grey] * 3, axis=-1))


GOOD = {"train_images": np.zeros((4, 6, 5, 3), np.uint8), "train_labels": np.array([0, 1, 0, 1])}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"train_images": None, "train_labels": None, "arr_0": TRAIN}, "must hold the arrays"),
        ({"test_images": GOOD["train_images"]}, "holds test_images, but not images and labels"),
        ({"x_train": GOOD["train_images"]}, "once, not train_images and x_train"),
        ({"train_images": None, "x": GOOD["train_images"]}, "must hold the arrays"),
        ({"train_images": np.zeros((4, 6, 5, 3))}, "train_images must be uint8, uint16 or float32"),
        ({"train_images": np.zeros((4, 6), np.uint8)}, "train_images must be [n, H, W, C]"),
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
def test_arrays_that_break_a_rule_are_refused(tmp_path, change, rule):
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
def test_an_unreadable_file_is_refused(tmp_path, content):
    path = tmp_path / "bad.npz"
    save_npz(path, random_split(12), random_split(12))
    damage(path, content)
    assert_refused(f"npz:{path}", "must name a readable .npz file")


def write_npz(path, headers, data=b"\0" * 1000):
    """Writes an npz file with these headers: (name, literal dict) of each array."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, header in headers:
            text = header.encode().ljust(200) + b"\n"
            magic = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text))
            archive.writestr(f"{name}.npy", magic + text + data)


def header(shape, dtype="|u1"):
    return f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}"


CLASSES = ("train_labels", header("(4,)"))


@pytest.mark.parametrize(
    ("headers", "rule"),
    [
        ([("train_images", header("(99999, 999, 999, 3)")), CLASSES], "this is 278.8 GiB"),
        ([("train_images", header("(1, 99999999, 9, 3)")), CLASSES], "is shorter than its shape"),
        ([("train_images", header(f"({2**32}, {2**32})")), CLASSES], "GiB"),
        ([("train_images", header("(-4, -2, 2, 3)")), CLASSES], "must name a readable .npz"),
        ([("train_images", header("((9,),)")), CLASSES], "must name a readable .npz"),
        ([("train_images", "(" * 190), CLASSES], "must name a readable .npz"),
        ([("train_images", header("(4, 2, 2, 3)", "|O")), CLASSES], "train_images must be uint8"),
        ([("train_images", header("(4, 2, 2, 3)")), CLASSES, CLASSES], "must hold the arrays"),
        ([("train_images", header("(4, 2, 2, 3)")), ("train_labels", header("(99999999,)"))],
         "is shorter than its shape"),
        ([("train_images", header("(4, 2, 2, 3)")), ("train_labels", header("(4,)", "<m8[s]"))],
         "labels must be integers"),
    ],
)  # fmt: skip
def test_false_headers_are_refused_before_memory_is_allocated(tmp_path, headers, rule):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of the duplicate name
        write_npz(tmp_path / "bad.npz", headers)
    assert_refused(f"npz:{tmp_path}/bad.npz", rule)


def test_grey_images_too_large_as_rgb_are_refused(tmp_path, monkeypatch):
    write_npz(tmp_path / "grey.npz", [("train_images", header("(4, 15, 15)")), CLASSES])
    monkeypatch.setattr("hjepa_jax.data.base.MAX_RESIDENT_BYTES", 3 * 900 - 1)
    assert_refused(f"npz:{tmp_path}/grey.npz", "must fit the device as uint8")
