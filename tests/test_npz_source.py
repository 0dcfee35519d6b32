"""npz files as other programs write them, read without a second copy."""

import tracemalloc

import numpy as np
import pytest

from hjepa_jax.data.sources import open_source
from hjepa_jax.errors import InputError

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
def test_the_usual_names_of_arrays_are_known(tmp_path, capsys, train, test):
    source = opened(tmp_path, {**pair(TRAIN, train), **pair(TEST, test)})
    for split, images in zip(source.load(), (TRAIN, TEST), strict=True):
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, LABELS[len(images)])
    assert capsys.readouterr().err == (
        f"npz:{tmp_path}/data.npz: train 10 images in {train.split()[0]}; "
        f"test 4 images in {test.split()[0]}; 2 classes (0, 1)\n"
    )


def test_medmnist_is_read_and_its_other_split_is_named(tmp_path, capsys):
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
def test_labels_may_have_a_second_axis_or_be_one_hot_or_whole_floats(tmp_path, labels):
    train, test = opened(
        tmp_path, {"x_train": TRAIN, "y_train": labels, **pair(TEST, "x_test y_test")}
    ).load()
    assert train.labels.dtype == np.int32
    assert train.labels.tolist() == LABELS[10].tolist()
    assert test.labels.tolist() == LABELS[4].tolist()


@pytest.mark.parametrize(
    ("arrays", "rule"),
    [
        ({"arr_0": TRAIN, "arr_1": LABELS[10]}, "must hold the arrays"),
        (
            {"x_train": TRAIN, "y_train": LABELS[10], "x_test": TEST},
            "holds x_test, but not images and labels of a test set",
        ),
        ({"x_train": TRAIN, "train_x": TRAIN, "y_train": LABELS[10]}, "not x_train and train_x"),
        ({"x_train": TRAIN / 255, "y_train": LABELS[10]}, "x_train must be uint8, values 0 to 255"),
        ({"x_train": TRAIN.astype(int), "y_train": LABELS[10]}, "x_train must be uint8"),
        ({"x_train": TRAIN.transpose(0, 3, 1, 2), "y_train": LABELS[10]}, "must be [n, H, W, 3]"),
        ({"x_train": TRAIN, "y_train": RNG.integers(2, size=(10, 5))}, "or one-hot rows"),
    ],
)
def test_what_is_no_pair_of_images_and_labels_is_refused(tmp_path, arrays, rule):
    with pytest.raises(InputError) as caught:
        opened(tmp_path, arrays)
    assert str(caught.value).startswith(f"data.source='npz:{tmp_path}/data.npz': ")
    assert rule in str(caught.value)


def test_an_array_in_fortran_order_is_read_alike(tmp_path):
    arrays = {"x_train": np.asfortranarray(TRAIN), "y_train": LABELS[10]}
    train, _ = opened(tmp_path, {**arrays, **pair(TEST, "x_test y_test")}).load()
    np.testing.assert_array_equal(train.images, TRAIN)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_reading_needs_the_memory_of_the_images_once(tmp_path, channels):
    """The peak was 2 times the decoded size, with all splits and channels held at once."""
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


def test_half_of_a_validation_set_is_named_and_not_used(tmp_path, capsys):
    arrays = {**pair(TRAIN, "train_images train_labels"), "val_labels": LABELS[4]}
    train, test = opened(tmp_path, arrays).load()
    assert [len(train.labels), len(test.labels)] == [9, 1]
    assert "not used: 1 other arrays (val_labels)" in capsys.readouterr().err
