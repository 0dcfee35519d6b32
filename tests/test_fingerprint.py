"""Fingerprints change with every byte of the data, and with nothing else."""

import dataclasses
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from hjepa_jax.data import fingerprint as module
from hjepa_jax.data.base import Split
from hjepa_jax.data.fingerprint import content, differ, digest_arrays, fingerprint
from hjepa_jax.data.records import Streaming
from hjepa_jax.data.sources import open_source

RNG = np.random.default_rng(0)


def random_split(num: int = 700) -> Split:
    """Returns 700 random images by default: from 512 on, a sample of 256 missed some."""
    images = RNG.integers(256, size=(num, 4, 5, 3), dtype=np.uint8)
    return Split(images, RNG.integers(4, size=num, dtype=np.int32))


@pytest.mark.parametrize("chunk_bytes", [2000, 2**24])
def test_every_byte_of_images_and_labels_counts(monkeypatch, chunk_bytes):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    split = random_split()
    before = fingerprint(split)
    assert fingerprint(Split(split.images.copy(), split.labels.copy())) == before
    found = {before}
    positions = [*RNG.integers(split.images.size, size=20), 0, split.images.size - 1]
    for position in positions:
        images = split.images.copy()
        images.reshape(-1)[position] ^= 1
        found.add(fingerprint(Split(images, split.labels)))
    for row in (0, 1, 699):
        labels = split.labels.copy()
        labels[row] += 1
        found.add(fingerprint(Split(split.images, labels)))
    assert len(found) == 1 + len(set(positions)) + 3


def test_order_shape_type_and_test_images_count_and_names_of_files_do_not():
    split, other = random_split(), random_split()
    variants = [
        fingerprint(split),
        fingerprint(Split(split.images[::-1], split.labels)),
        fingerprint(Split(split.images.reshape(700, 5, 4, 3), split.labels)),
        fingerprint(Split(split.images[:-1], split.labels[:-1])),
        fingerprint(split, test=other),
        fingerprint(split, test=split),
        fingerprint(other, test=split),
    ]
    assert len(set(variants)) == len(variants)
    assert digest_arrays(split.images) != digest_arrays(split.images.view(np.int8))
    assert digest_arrays(np.zeros(2), np.zeros(1)) != digest_arrays(np.zeros(1), np.zeros(2))
    named = dataclasses.replace(split, names=tuple(map(str, range(700))))
    assert fingerprint(named) == variants[0], "a folder that was renamed is the same data"


def test_non_contiguous_arrays_are_hashed_in_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 2**16)
    images = RNG.integers(256, size=(2000, 32, 32, 6), dtype=np.uint8)
    part = images[..., ::2]
    tracemalloc.start()
    found = digest_arrays(part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < part.nbytes / 4
    assert found == digest_arrays(np.ascontiguousarray(part))


def test_other_values_than_fingerprints_are_not_compared():
    whole = "all-0123456789abcdef"
    assert differ(whole, "all-0123456789abcdee")
    for old in (whole, "0123456789abcdef", None, 3):
        assert not differ(old, whole)
    assert not differ(whole, None)


# Streamed sets


@pytest.fixture
def folder(tmp_path):
    """A streamed folder of 300 images in two classes."""
    for i in range(300):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:03}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def opened(folder):
    streaming = Streaming("always", max_labelled=20)  # only 20 are in memory
    return open_source(f"folder:{folder}", data_dir=None, image_size=4, streaming=streaming)


def streamed_fingerprint(folder) -> str:
    source = opened(folder)
    return fingerprint(source.load()[0], source.records)


def unseen_file(folder):
    """Returns a training file that is neither in memory nor among the records that are read."""
    source = opened(folder)
    files, labelled = source.records.files, {str(folder / n) for n in source.load()[0].names}
    step = max(1, len(files) // module.NUM_SAMPLED)
    return next(f for i, f in enumerate(files) if i % step and f not in labelled)


def test_an_unread_streamed_file_is_noticed_by_its_time(folder):
    before, path = streamed_fingerprint(folder), unseen_file(folder)
    assert streamed_fingerprint(folder) == before
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)  # the size stays the same
    after = streamed_fingerprint(folder)
    assert differ(before, after)
    assert content(before) == content(after)


def test_a_streamed_file_of_another_size_is_other_content(folder):
    before = streamed_fingerprint(folder)
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(unseen_file(folder))
    assert content(before) != content(streamed_fingerprint(folder))


def test_swapped_streamed_files_are_noticed(folder):
    before, path = streamed_fingerprint(folder), unseen_file(folder)
    other = folder / "a" / "000.bmp"
    shutil.move(path, folder / "x")
    shutil.move(other, path)
    shutil.move(folder / "x", other)
    assert differ(before, streamed_fingerprint(folder))


def test_a_moved_or_copied_folder_has_the_same_content(folder, tmp_path):
    before = streamed_fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)  # drops the file times
    for file in (tmp_path / "copy").rglob("*.bmp"):
        os.utime(file, (0, 0))
    assert content(streamed_fingerprint(tmp_path / "copy")) == content(before)
    shutil.move(folder, tmp_path / "elsewhere")
    assert streamed_fingerprint(tmp_path / "elsewhere") == before
