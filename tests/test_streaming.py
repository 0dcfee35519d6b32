"""Streamed batches equal resident batches, also after a kill and with corrupt files."""

import contextlib
import errno
import importlib
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import sys
import time

import jax
import numpy as np
import pytest
from array_record.python import array_record_module
from ml_collections import ConfigDict
from PIL import Image

from hjepa_jax.config import base_config
from hjepa_jax.data import class_list, streaming
from hjepa_jax.data.fingerprint import fingerprint
from hjepa_jax.data.order import BatchOrder
from hjepa_jax.data.records import Streaming, read_or_next, report_skipped, unreadable_errors
from hjepa_jax.data.sources import open_source
from hjepa_jax.errors import InputError
from hjepa_jax.reporting.publish import write_report
from hjepa_jax.training import train
from tests import processes
from tests.conftest import REPOSITORY
from tests.faults.test_kills import newest_checkpoint, newest_line, state_and_lines
from tests.test_tfds_source import define_tiny_set


class Numbers:
    """Records in which image `row` has the value `row`; `unreadable` rows raise an error."""

    image_shape = (2, 3, 3)

    def __init__(self, num: int, unreadable: tuple[int, ...] = ()):
        self.num, self.unreadable = num, unreadable

    def __len__(self) -> int:
        return self.num

    def read(self, row: int) -> np.ndarray:
        if row in self.unreadable:
            raise InputError("data.source", f"number {row}", "is corrupt")
        return np.full(self.image_shape, row, np.uint8)

    def stamps(self) -> list[tuple[str, int, int]]:
        return [(str(row), 1, 0) for row in range(self.num)]


def read(records, order, *steps, num_workers=0, **shard):
    """Returns the image values of each batch, or of a share, and the unreadable rows."""
    batches = list(streaming.read_batches(records, order, *steps, num_workers=num_workers, **shard))
    return [images[:, 0, 0, 0].tolist() for images, _ in batches], [
        row for _, rows in batches for row in rows.tolist()
    ]


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers():
    order, unreadable = BatchOrder(23, 4, seed=5), (0, 7, 8, 22)
    rows = order.batches(3, 9, size=9)
    assert read(Numbers(23), order, 3, 12) == (rows.tolist(), [])
    replaced = np.select([rows == 0, rows == 7, rows == 8, rows == 22], [1, 9, 9, 1], rows)
    for num_workers, share, columns in (
        (0, {}, slice(None)),
        (2, {}, slice(None)),
        (2, {"shard_index": 1, "shard_count": 2}, slice(2, None)),
    ):
        found = read(Numbers(23, unreadable), order, 3, 12, num_workers=num_workers, **share)
        bad = [row for row in rows[:, columns].reshape(-1).tolist() if row in unreadable]
        assert found == (replaced[:, columns].tolist(), bad)


def test_processes_share_every_part_of_an_accumulated_batch():
    order = BatchOrder(24, 12, seed=1)
    (whole,), _ = read(Numbers(24), order, 1, 2, num_parts=2)
    assert whole == order.batches(1, 1, size=1)[0].tolist()
    shards = [
        read(Numbers(24), order, 1, 2, num_parts=2, shard_index=i, shard_count=3)[0][0]
        for i in range(3)
    ]
    assert shards[1] == [*whole[2:4], *whole[8:10]]
    parts = np.array(shards).reshape(3, 2, 2).swapaxes(0, 1)
    assert parts.reshape(-1).tolist() == whole


def test_a_wholly_unreadable_set_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"number 1': nor can any of the 4 before it be read"):
        read(Numbers(5, tuple(range(5))), BatchOrder(5, 2, seed=0), 0, 2)
    image, is_own = read_or_next(Numbers(3, (2,)), 2)
    assert (image.max(), is_own) == (0, False)
    error = pickle.loads(pickle.dumps(InputError("a.b", 3, "rule")))
    assert (str(error), error.value) == ("a.b=3: rule", 3)


def test_corrupt_records_are_named_in_one_line(capsys):
    errors = unreadable_errors(Numbers(9, (1, 3, 5, 7)), {7, 5, 3, 1})
    report_skipped("folder:x", errors, "9 images")
    assert capsys.readouterr().err == (
        "folder:x: 4 of 9 images skipped: number 1 is corrupt; number 3 is corrupt; "
        "number 5 is corrupt; and 1 more\n"
    )


def test_device_batches_are_padded_to_the_size_of_a_call():
    order = BatchOrder(12, 4, seed=0)
    batches = streaming.read_batches(Numbers(12, (3,)), order, 0, 10_000, num_workers=0)
    streamed = streaming.StreamedBatches(batches, size=3, put=jax.device_put)
    first, index = streamed.take(0, 3)
    second, _ = streamed.take(3, 1)
    assert (first.shape, second.shape, index) == ((3, 4, 2, 3, 3), (3, 4, 2, 3, 3), None)
    rows = np.where(order.batches(0, 4, size=4) == 3, 4, order.batches(0, 4, size=4))
    assert first[..., 0, 0, 0].tolist() == rows[:3].tolist()
    assert second[0, :, 0, 0, 0].tolist() == rows[3].tolist()
    assert streamed.unreadable == {3}
    streamed.close()
    assert not streamed._thread.is_alive()


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_in_one_line():
    order = BatchOrder(20, 4, seed=0)
    batches = streaming.read_batches(Numbers(20), order, 0, 10_000, num_workers=1)
    before = set(multiprocessing.active_children())
    streamed = streaming.StreamedBatches(batches, size=1, put=jax.device_put)
    streamed.take(0, 1)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    take_rest = lambda: [streamed.take(step, 1) for step in range(1, 10_000)]
    with pytest.raises(InputError, match=r"data.num_workers=1: a process that reads .* code -9"):
        take_rest()
    streamed.close()


@pytest.fixture
def streamed_config(tiny_config, shapes_folder):
    fields = {
        "data.source": f"folder:{shapes_folder}", "data.streaming": "always",
        "data.image_size": 16, "data.num_workers": 1, "model.patch_size": 4,  # stored: 32x32
        "train.num_steps": 22, "train.steps_per_call": 4,  # 10 steps per epoch
        "train.checkpoint_every_steps": 4, "eval.every_epochs": 0.0, "log.every_steps": 1,
    }  # fmt: skip
    with tiny_config.unlocked():
        tiny_config.update_from_flattened_dict(fields)
    return tiny_config


@pytest.fixture(scope="module")
def damaged(shapes_folder, tmp_path_factory):
    """A copy of the folder with text in its first training image, and the path of that image."""
    folder = tmp_path_factory.mktemp("damaged") / "images"
    shutil.copytree(shapes_folder, folder, copy_function=os.link)
    (first, *_) = sorted((folder / "train").glob("*/*"))
    first.unlink()
    first.write_text("no image")
    return folder, first


def test_a_streamed_folder_equals_a_resident_one(shapes_folder, monkeypatch):
    def opened(when, **options):
        options = {"image_size": 16, "streaming": Streaming(when, **options)}
        return open_source(f"folder:{shapes_folder}", data_dir=None, **options)

    resident, streamed = opened("never"), opened("always")
    train_set, _ = resident.load()
    images = np.stack([streamed.records.read(row) for row in range(len(streamed.records))])
    np.testing.assert_array_equal(images, train_set.images)
    assert (streamed.num_images, resident.num_images, resident.records) == (160, 160, None)
    drawn = [opened("always", max_labelled=30).load() for _ in range(2)]
    assert [len(split.labels) for split in drawn[0]] == [30, 30]
    assert drawn[0][0].names == drawn[1][0].names
    assert set(drawn[0][0].names) < set(train_set.names)
    assert len({fingerprint(train_set), fingerprint(train_set, streamed.records)}) == 2

    assert opened("auto", max_labelled=100).records is None
    monkeypatch.setattr("hjepa_jax.data.base.MAX_RESIDENT_BYTES", 160 * 16 * 16 * 3 - 1)
    assert len(opened("auto", max_labelled=100).records) == 160


@pytest.mark.parametrize("split_names", [("train", "test"), ("a",)])
def test_originals_are_the_same_resident_and_streamed(tmp_path, split_names):
    """Covers folders with a test split, and folders that hold out test images."""
    rng = np.random.default_rng(0)
    for name in split_names:
        for i in range(12):
            path = tmp_path / name / "xy"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (20, 44 - i % 3, 3) if i % 2 else (30 + i % 3, 28, 3)
            Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(path)

    def opened(when, **options):
        options = {"image_size": 16, "streaming": Streaming(when), "stored_area": 2.0} | options
        return open_source(f"folder:{tmp_path}", data_dir=None, **options)

    resident, streamed = opened("never"), opened("always")
    train_set, _ = resident.load()
    originals = resident.originals(train_set)
    assert resident.train_shape == streamed.train_shape == originals.shape[1:]
    height, width, _ = originals.shape[1:]
    assert height < width
    assert 1.9 < height * width / 16**2 < 2.1
    read = [streamed.records.read(row) for row in range(len(streamed.records))]
    np.testing.assert_array_equal(np.stack(read), originals)
    np.testing.assert_array_equal(streamed.load()[0].images, train_set.images)  # 16x16
    assert opened("never", image_size=64).train_shape[:2] == (25, 35)  # never enlarged
    assert opened("never", stored_area=1.0).originals is None


@pytest.mark.parametrize(
    ("source", "streaming", "message"),
    [
        ("shapes", Streaming("always"), r"data.streaming='always': needs a source tfds"),
        ("shapes", Streaming("always", train_split="x"), "data.streaming"),
        ("folder:.", Streaming("always", train_split="x"), r"data.train_split='x': needs .* tfds"),
        ("folder:.", Streaming("always", class_list="y"), r"data.class_list='y': needs .* tfds"),
    ],
)
def test_sources_that_cannot_be_streamed_are_refused(source, streaming, message):
    with pytest.raises(InputError, match=message):
        open_source(source, data_dir=None, image_size=8, streaming=streaming)


@pytest.mark.slow
def test_sigkill_of_a_streamed_run_changes_nothing(streamed_config, tmp_path):
    """The resumed run equals a run on resident data bit for bit, in losses and state."""
    streamed_config.train.num_steps, streamed_config.train.steps_per_call = 40, 1
    resident = streamed_config.copy_and_resolve_references()
    resident.data.streaming = "never"
    train.train_and_evaluate(resident, tmp_path / "resident")

    killed, workers = tmp_path / "killed", []
    process = processes.start(streamed_config, killed)
    while process.is_alive() and newest_checkpoint(killed) == 0:
        time.sleep(0.001)
    for each in pathlib.Path(f"/proc/{process.pid}/task").glob("*/children"):  # one file per thread
        with contextlib.suppress(OSError):  # the thread has just ended
            workers += each.read_text().split()
    assert workers or sys.platform != "linux"
    process.kill()
    process.join()
    assert process.exitcode == -9
    assert newest_line(killed) < 40
    deadline = time.monotonic() + 20
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers are still alive after the run was killed"
        time.sleep(0.01)
    assert processes.finish(streamed_config, killed) == 0
    assert "going on at step" in processes.printed(killed)

    arrays, lines = state_and_lines(streamed_config, killed)
    expected_arrays, expected_lines = state_and_lines(resident, tmp_path / "resident")
    assert lines == expected_lines
    jax.tree.map(np.testing.assert_array_equal, arrays, expected_arrays)


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures")
def test_a_run_counts_corrupt_files_once(streamed_config, damaged, tmp_path, capsys):
    folder, first = damaged
    c, workdir = streamed_config, tmp_path / "run"
    c.data.source, c.data.num_workers, c.data.max_labelled = f"folder:{folder}", 0, 40
    train.train_and_evaluate(c, workdir)
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    (trained,) = [line for line in said if "the next was trained on instead" in line]
    assert f"1 of 160 images (the next was trained on instead) skipped: {first}" in trained
    assert newest_line(workdir) == 22
    write_report([workdir], workdir, images=False)
    report = (workdir / "report.md").read_text()
    assert re.search(r"- step \d+: training images: 1 unreadable so far", report)


@pytest.mark.slow
def test_a_failing_disk_is_reported_as_the_data_source(
    streamed_config, damaged, tmp_path, monkeypatch
):
    def read(records, row):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(streaming, "read_or_next", read)
    c = streamed_config
    c.data.source, c.data.num_workers, c.data.max_labelled = f"folder:{damaged[0]}", 0, 40
    rule = r"^data.source='folder:.*': can no longer be read \(.*Input/output error"
    with pytest.raises(InputError, match=rule):
        train.train_and_evaluate(c, tmp_path / "run")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    """Data directory of a TFDS set with three splits, prepared as array_record."""
    splits = [("train", 20), ("test", 6), ("unlabelled", 24)]
    define_tiny_set("TinyStreamed", splits, (4, 6, 3), labels=("x", "y", "z"))
    path = str(tmp_path_factory.mktemp("tfds"))
    open_tfds(path)
    return path


def open_tfds(data_dir, when="always", **options):
    streaming = Streaming(when, **options)
    return open_source("tfds:tiny_streamed", data_dir=data_dir, image_size=8, streaming=streaming)


def test_streamed_tfds_records_equal_resident_ones(tfds_dir, tmp_path):
    source = open_tfds(tfds_dir, train_split="unlabelled")
    assert (source.num_images, source.info.num_train, source.info.num_test) == (24, 20, 6)
    assert source.info.image_shape == (4, 6, 3)
    reopened = pickle.loads(pickle.dumps(source.records))
    values = [reopened.read(row)[0, 0, 0] for row in range(24)]
    assert sorted(values) == list(range(0, 240, 10))

    loaded, _ = open_tfds(str(tmp_path), "never").load()  # prepared as tfrecord
    streamed = open_tfds(tfds_dir)
    images = np.stack([streamed.records.read(row) for row in range(20)])
    np.testing.assert_array_equal(images, loaded.images)
    for split in (streamed.load()[0], loaded):
        np.testing.assert_array_equal(split.labels, split.images[:, 0, 0, 0] // 10 % 2)

    resident = open_tfds(tfds_dir, "never")
    assert resident.records is None
    for split, other in zip(resident.load(), open_tfds(str(tmp_path), "never").load(), strict=True):
        np.testing.assert_array_equal(split.images, other.images)
        np.testing.assert_array_equal(split.labels, other.labels)

    rule = r"is prepared as tfrecord in .* name another folder as data.dir"
    with pytest.raises(InputError, match=rule):
        open_tfds(str(tmp_path), "always")
    with pytest.raises(InputError, match=r"data.train_split='x': must be a split of tfds:tiny_str"):
        open_tfds(tfds_dir, train_split="x")


def test_a_set_of_unknown_size_is_prepared_for_streaming(tmp_path, monkeypatch):
    define_tiny_set("TinyAuto", [("train", 20), ("test", 6)], (4, 6, 3))
    options = {"data_dir": str(tmp_path), "image_size": 8}
    resident = open_source("tfds:tiny_auto", **options, streaming=Streaming("auto"))
    assert (resident.records, len(resident.load()[0].labels)) == (None, 20)
    monkeypatch.setattr("hjepa_jax.data.base.MAX_RESIDENT_BYTES", 20 * 4 * 6 * 3 - 1)
    few = Streaming("auto", max_labelled=5)
    assert len(open_source("tfds:tiny_auto", **options, streaming=few).records) == 20


@pytest.mark.parametrize("num_corrupt", [1, 20])
def test_corrupt_records_are_skipped_with_a_class_list(tfds_dir, tmp_path, capsys, num_corrupt):
    (path,) = pathlib.Path(tfds_dir).glob("*/*/*train*array_record*")
    folder, classes = tmp_path / "tiny_streamed" / path.parent.name, tmp_path / "classes.txt"
    shutil.copytree(path.parent, folder)
    classes.write_text("x\ny\n")
    # The file is valid and only its records are not: a damaged file could not be opened.
    records = array_record_module.ArrayRecordReader(str(path)).read_all()
    writer = array_record_module.ArrayRecordWriter(str(folder / path.name), "group_size:1")
    for record in [b"\xff"] * num_corrupt + records[num_corrupt:]:
        writer.write(record)
    writer.close()
    opened = lambda: open_tfds(str(tmp_path), class_list=str(classes))
    if num_corrupt == 20:
        with pytest.raises(InputError, match=r"data.source='train\[0\]': cannot be read"):
            opened()
        return
    source = opened()
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert "1 of 20 records of split train (their class is unknown) skipped: train[0] can" in said
    assert source.num_images == len(source.load()[0].labels) == 19
    opened()  # labels from the cache
    assert "skipped: train[0] can" in capsys.readouterr().err


def test_a_class_list_restricts_a_set_and_its_labels(tfds_dir, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("y\nz\n")
    source = open_tfds(tfds_dir, class_list=str(path))
    assert source.info.class_names == ("y", "z")
    assert source.num_images == 10  # x and y alternate
    train_set, test_set = source.load()
    assert (train_set.labels.tolist(), len(test_set.labels)) == ([0] * 10, 3)
    assert set(train_set.images[:, 0, 0, 0] // 10 % 2) == {1}
    for text, rule in (("y\nq\n", "and q is none"), ("y\ny\n", "each once"), ("", "two classes")):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"data.class_list=.*{rule}"):
            open_tfds(tfds_dir, class_list=str(path))
    with pytest.raises(InputError, match=r"data.class_list=.*must be a file of class names"):
        open_tfds(tfds_dir, class_list=str(tmp_path / "none.txt"))


def test_a_class_list_is_found_beside_config_or_in_repository(tmp_path, monkeypatch):
    shipped = "configs/imagenet100_classes.txt"
    (tmp_path / "own" / "configs").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    for name in ("here.txt", "configs/here.txt", "configs/beside.txt", f"own/{shipped}"):
        (tmp_path / name).write_text("x\ny\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def resolve(path, config_file="configs/own.py"):
        config = base_config().lock()
        config.data.class_list = path
        class_list.resolve_class_list(config, config_file)
        return config.data.class_list

    beside = str(tmp_path / "configs" / "beside.txt")
    assert resolve("beside.txt") == beside
    assert class_list.find_class_list(beside).exists()
    for path in ("here.txt", "~/here.txt", "configs/here.txt", "none.txt", shipped, None):
        assert resolve(path) == path
    assert class_list.find_class_list(shipped) == REPOSITORY / "hjepa_jax" / shipped
    assert class_list.find_class_list("here.txt").read_text() == "x\ny\n"
    class_list.resolve_class_list(ConfigDict({"other": 1}), "configs/own.py")  # not an error
    assert resolve(shipped, "own/c.py") == str(tmp_path / "own" / shipped), (
        "the user's own file wins"
    )


def test_unused_splits_of_a_tfds_set_are_named(tfds_dir, capsys):
    unused = "; not used: 1 other splits (unlabelled)"
    for when, split, num, rest in (
        ("never", "train", 20, unused), ("always", "train", 20, unused),
        ("always", "unlabelled", 24, ""),
    ):  # fmt: skip
        open_tfds(tfds_dir, when, train_split=None if split == "train" else split)
        used = f"train {num} images in split {split}; test 6 images in split test; 3 classes"
        assert capsys.readouterr().err == f"tfds:tiny_streamed: {used} (x, y, z){rest}\n"


def test_a_streamed_set_without_test_split_holds_out_a_tenth(tmp_path):
    define_tiny_set("TinyUntested", [("train", 25)], (4, 6, 3))
    options = {"data_dir": str(tmp_path), "image_size": 8}
    for seed in (0, 1):
        streamed, resident = (
            open_source("tfds:tiny_untested", **options, seed=seed, streaming=Streaming(when))
            for when in ("always", "never")
        )
        for split, other in zip(streamed.load(), resident.load(), strict=True):
            np.testing.assert_array_equal(split.images, other.images)
            np.testing.assert_array_equal(split.labels, other.labels)
        assert sorted(split.labels) == [0, 1]
        assert len(streamed.records) == 23


def test_the_shipped_list_has_100_classes_of_imagenet():
    config = importlib.import_module("hjepa_jax.configs.imagenet100_small").get_config()
    names = class_list.find_class_list(config.data.class_list).read_text().split()
    tfds_file = "datasets/imagenet2012/labels.txt"
    tfds_dir = pathlib.Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    assert len(set(names)) == 100
    assert set(names) < set((tfds_dir / tfds_file).read_text().split())
