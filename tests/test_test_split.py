"""The held-out test images are a stratified tenth that depends only on the labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa_jax.data import test_split
from hjepa_jax.data.base import Split
from hjepa_jax.errors import InputError


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_each_class_gives_its_share_and_keeps_an_image(counts, num_unlabelled):
    labels = np.repeat(np.arange(-1, len(counts)), [num_unlabelled, *counts])
    labels = np.random.default_rng(1).permutation(labels)
    if max(counts) < 2:
        with pytest.raises(InputError, match=r"one image cannot|no class has two images"):
            test_split.draw_test_rows("x", labels)
        return
    kept, held = test_split.draw_test_rows("x", labels)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()
    assert (labels[held] >= 0).all()
    total = max(1, len(labels) // 10)
    shares = np.array(counts) * total / sum(counts)
    found = np.bincount(labels[held], minlength=len(counts))
    can_give = np.maximum(np.array(counts) - 1, 0)
    assert len(held) == total or (found >= np.minimum(np.floor(shares), can_give)).all()
    assert (found <= can_give).all(), "every class keeps an image"
    assert (np.abs(found - np.minimum(shares, can_give)) < 1).all()


def test_equal_classes_give_equal_numbers():
    labels = np.repeat(np.arange(10), 100)
    kept, held = test_split.draw_test_rows("x", labels)
    assert np.bincount(labels[held]).tolist() == [10] * 10
    np.testing.assert_array_equal(held, test_split.draw_test_rows("x", labels)[1])
    assert len(np.unique(held % 100)) > 50, "classes must not all give the same rows"
    assert len(kept) == 900


def test_rows_are_kept_in_place_and_in_order(monkeypatch):
    monkeypatch.setattr(test_split, "_BLOCK_BYTES", 7)
    rng = np.random.default_rng(0)
    for num in (1, 2, 5, 50):
        array = rng.integers(256, size=(num, 2), dtype=np.uint8)
        rows = np.flatnonzero(rng.random(num) < 0.7)
        expected = array[rows]
        found = test_split.keep_rows(array, rows)
        np.testing.assert_array_equal(found, expected)
        assert found.base is array or found is array


def test_images_labels_and_names_stay_together():
    labels = np.arange(40, dtype=np.int32) % 3
    images = np.zeros((40, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(40)
    whole = Split(images, labels, tuple(map(str, range(40))))
    train, test = test_split.hold_out_test("x", whole)
    assert len(test.labels) == 4
    for split in (train, test):
        rows = split.images[:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(split.labels, rows % 3)
        assert split.names == tuple(map(str, rows))
