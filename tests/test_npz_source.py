"""npz sources: common array names, refused files, memory use."""

import io
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from hjepa_jax.data.npz import save_npz
from hjepa_jax.data.sources import open_source
from hjepa_jax.errors import InputError
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


ONE_HOT = np.eye(2)[LABELS[10]]


@pytest.mark.parametrize(
    "labels",
    [
        LABELS[10][:, None], LABELS[10][:, None, None], LABELS[10].astype(np.float32),
        LABELS[10].astype(bool), LABELS[10].astype(">u8"), ONE_HOT, ONE_HOT.astype(bool),
        np.asfortranarray(ONE_HOT.astype(np.uint8)),
    ],
)  # fmt: skip
def test_labels_may_be_columns_one_hot_or_whole_floats(tmp_path, labels):
    images = np.asfortranarray(TRAIN)
    arrays = {"x_train": images, "y_train": labels, **pair(TEST, "x_test y_test")}
    train, test = opened(tmp_path, arrays).load()
    np.testing.assert_array_equal(train.images, TRAIN)
    assert train.labels.dtype == np.int32
    assert train.labels.tolist() == LABELS[10].tolist()
    assert test.labels.tolist() == LABELS[4].tolist()


@pytest.mark.parametrize("channels", [(), (3,)])
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
    assert peak < 1.1 * decoded + 2 * 2**24 + 2**22  # a tenth for the test split, and two blocks
    first = np.concatenate([train.images[:, 0, 0, 0], test.images[:, 0, 0, 0]])
    assert np.array_equal(np.bincount(first), np.bincount(np.arange(30_000) % 251))


def test_validation_labels_without_images_are_not_used(tmp_path, capsys):
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
INF, NAN, BYTES = np.inf, np.nan, lambda *shape: np.zeros(shape, np.uint8)
BAD_IMAGES = [
    (GOOD["train_images"].astype(np.float64), "must be uint8, uint16 or float32"),
    (GOOD["train_images"].astype(np.int64), "must be uint8"),
    (BYTES(4, 6), "must be [n, H, W, C]"),
    (BYTES(0, 6, 5, 3), "must not be empty"),
]
BAD_LABELS = [
    (np.array(["a", "b", "a", "b"]), "must be integers"),
    (np.array([None] * 4), "must be integers"),
    (np.arange(4) / 2, "must hold one label per image: whole"),
    (np.array([0, 1, 0, NAN]), "must hold one label per"),
    (np.array([0, 1, 0, INF]), "must hold one label per"),
    (np.arange(5), "must hold one label per image"),
    (np.full(4, 1e30), "must lie in [0, 65535]"),
    (np.full(4, -1e30), "must lie in [0, 65535]"),
    (np.arange(4) - 1, "must lie in [0, 65535]"),
    (np.array([0, 1, 2, 2**40]), "must lie in [0, 65535]"),
    *((np.full(shape, value), "must hold one label per image: whole numbers [n] or [n, 1], or one")
      for shape, value in (((4, 2), 1), ((4, 2), 0), ((4, 0), 0), ((4, 2, 2), 0))),
]  # fmt: skip
BROKEN = [
    *(({"train_images": images}, f"train_images {rule}") for images, rule in BAD_IMAGES),
    *(({"train_labels": labels}, f"train_labels {rule}") for labels, rule in BAD_LABELS),
    ({"train_images": None, "train_labels": None, "arr_0": TRAIN}, "must hold the arrays"),
    ({"train_images": None, "x": GOOD["train_images"]}, "must hold the arrays"),
    ({"test_images": GOOD["train_images"]}, "holds test_images, but not images and labels"),
    ({"x_train": GOOD["train_images"]}, "once, not train_images and x_train"),
    ({"train_labels": np.arange(4)}, "no class has two images"),
    ({"train_images": BYTES(1, 6, 5, 3), "train_labels": np.arange(1)}, "one image cannot be spl"),
    ({"test_images": BYTES(2, 5, 6, 3), "test_labels": np.arange(2)},
     "train and test images differ in shape"),
    ({"test_images": BYTES(2, 6, 5, 3), "test_labels": np.arange(3)},
     "test_labels must hold one label per image"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "rule"), BROKEN, ids=range(len(BROKEN)))
def test_arrays_that_break_a_rule_are_refused(tmp_path, change, rule):
    arrays = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    assert_refused(f"npz:{tmp_path}/bad.npz", rule)


def npy(_):
    np.save(file := io.BytesIO(), np.zeros(3))
    return file.getvalue()


# Functions from the good content to the damaged content; None = the file is removed.
DAMAGE = {
    "absent": lambda good: None,
    "empty": lambda good: b"",
    "text": lambda good: b"<html>404</html>",
    "npy": npy,
    "truncated": lambda good: good[: len(good) // 2],
    "flipped": lambda good: good[:300] + bytes([good[300] ^ 255]) + good[301:],
    "folder": lambda good: None,
}


@pytest.mark.parametrize("content", DAMAGE)
def test_an_unreadable_file_is_refused(tmp_path, content):
    path = tmp_path / "bad.npz"
    save_npz(path, random_split(12), random_split(12))
    harmed = DAMAGE[content](path.read_bytes())
    path.unlink()
    if harmed is not None:
        path.write_bytes(harmed)
    elif content == "folder":
        path.mkdir()
    assert_refused(f"npz:{path}", "must name a readable .npz file")


def write_npz(path, headers, data=b"\0" * 1000):
    """Writes an npz file from one pair (array name, header as a literal dict) per array."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, header in headers:
            text = header.encode().ljust(200) + b"\n"
            magic = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text))
            archive.writestr(f"{name}.npy", magic + text + data)


def header(shape, dtype="|u1"):
    return f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}"


CLASSES, SMALL = ("train_labels", header("(4,)")), ("train_images", header("(4, 2, 2, 3)"))


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
        ([SMALL, CLASSES, CLASSES], "must hold the arrays"),
        ([SMALL, ("train_labels", header("(99999999,)"))], "is shorter than its shape"),
        ([SMALL, ("train_labels", header("(4,)", "<m8[s]"))], "labels must be integers"),
    ],
    ids=range(10),
)
def test_false_headers_are_refused_before_memory_is_allocated(tmp_path, headers, rule):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the duplicate name
        write_npz(tmp_path / "bad.npz", headers)
    assert_refused(f"npz:{tmp_path}/bad.npz", rule)


def test_grey_images_too_large_as_rgb_are_refused(tmp_path, monkeypatch):
    write_npz(tmp_path / "grey.npz", [("train_images", header("(4, 15, 15)")), CLASSES])
    monkeypatch.setattr("hjepa_jax.data.base.MAX_RESIDENT_BYTES", 3 * 900 - 1)
    assert_refused(f"npz:{tmp_path}/grey.npz", "must fit the device")


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.npz", None, "did you mean npz:"),
        ("a.npy", b"", "cannot be read"),
        ("a.npy", b"x", "can"),
    ],
)
def test_a_file_that_is_no_npy_is_refused(tmp_path, name, content, rule):
    path = tmp_path / name
    if content is None:
        np.savez(path, train_images=BYTES(2, 6, 5, 3))
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^data.source='npy:.*{rule}"):
        open_source(f"npy:{path}", data_dir=None, image_size=8)
