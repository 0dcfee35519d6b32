"""TFDS sources: splits, decoding, downloads and damaged files."""

import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hjepa_jax.config import base_config
from hjepa_jax.data.records import Streaming
from hjepa_jax.errors import InputError
from hjepa_jax.runs import run
from tests.test_sources import assert_refused, open_here


@pytest.fixture
def dead_cifar10(monkeypatch):
    """Redirects the download of CIFAR-10 to a port of this machine, by default a closed one."""
    import tensorflow_datasets as tfds

    def point_to(port):
        url = f"http://127.0.0.1:{port}/cifar-10.tar.gz"
        monkeypatch.setattr(tfds.builder_cls("cifar10"), "url_infos", {url: None})

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        point_to(closed.getsockname()[1])
    return point_to


def assert_download_refused(data_dir, reason, caplog):
    start = time.perf_counter()
    message = assert_refused("tfds:cifar10", reason, data_dir=str(data_dir))
    assert time.perf_counter() - start < 15
    for advice in ("127.0.0.1", "--config.data.dir", "configs/shapes_tiny.py"):
        assert advice in message
    assert not caplog.records
    assert not list(data_dir.iterdir())


def test_a_dead_network_gives_one_message_soon(tmp_path, dead_cifar10, caplog):
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


def test_a_silent_host_is_given_up(tmp_path, dead_cifar10, monkeypatch, caplog):
    monkeypatch.setattr("hjepa_jax.data.tfds.PROBE_SEC", 0.5)
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
def test_an_unknown_name_is_refused(tmp_path, name, rule):
    assert_refused(f"tfds:{name}", rule, data_dir=str(tmp_path))


def define_tiny_set(
    name, splits, image_shape, labels=("x", "y"), unlabelled="", dtype: Any = np.uint8
):
    """Registers a TFDS data set. All pixels of image i are 10 i; a varying width is 4 + i.

    All labels of the split `unlabelled` are -1.
    """
    import tensorflow_datasets as tfds

    def info(self):
        features = {
            "image": tfds.features.Image(shape=image_shape, dtype=dtype, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=labels) if labels else np.int32,
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def examples(self, split, num_examples):
        height, width, channels = image_shape
        for i in range(num_examples):
            image = np.full((height or 4, width or 4 + i, channels), 10 * i, dtype)
            yield i, {"image": image, "label": -1 if split == unlabelled else i % 2}

    members = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": lambda self, _: {k: self._generate_examples(k, n) for k, n in splits},
        "_generate_examples": examples,
        "pkg_dir_path": Path(__file__).parent,
    }
    type(name, (tfds.core.GeneratorBasedBuilder,), {"__module__": __name__, **members})


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_varying_size_are_cropped(tmp_path, channels):
    name = f"TinyVarying{'Grey' * (channels == 1)}"
    define_tiny_set(name, [("train", 6), ("validation", 3)], (None, None, channels))
    snake = "tfds:tiny_varying" + "_grey" * (channels == 1)
    source = open_here(snake, data_dir=str(tmp_path))
    assert (source.info.num_train, source.info.num_test) == (6, 3)
    assert source.info.image_shape == (8, 8, 3)
    train, test = source.load()
    assert train.images.shape == (6, 8, 8, 3)
    assert sorted(train.images[:, 7, 7, 2]) == [0, 10, 20, 30, 40, 50]
    np.testing.assert_array_equal(train.labels, train.images[:, 0, 0, 0] // 10 % 2)
    assert len(test.labels) == 3


@pytest.mark.parametrize("when", ["never", "always"])
def test_crops_are_cut_from_originals_of_varying_size(tmp_path, when):
    """The originals are 4 high and 4 to 23 wide, with a geometric mean of 12."""
    define_tiny_set(f"TinyOriginals{when.title()}", [("train", 20)], (None, None, 3))
    options = {"data_dir": str(tmp_path), "streaming": Streaming(when), "stored_area": 4.0}
    source = open_here(f"tfds:tiny_originals_{when}", **options)
    train, _ = source.load()
    assert train.images.shape == (18, 8, 8, 3)
    assert source.train_shape == (4, 12, 3)
    if source.originals is not None:
        found = source.originals(train)
    else:
        found = np.stack([source.records.read(row) for row in range(18)])
    assert found.shape == (18, 4, 12, 3)
    np.testing.assert_array_equal(found[:, 0, 0, 0], train.images[:, 0, 0, 0])
    assert (source.originals is None) == (when == "always")


def test_without_a_test_split_a_tenth_is_held_out(tmp_path):
    define_tiny_set("TinyGrey", [("train", 20)], (4, 6, 1))
    source = open_here("tfds:tiny_grey", data_dir=str(tmp_path))
    assert (source.info.num_train, source.info.num_test) == (18, 2)
    assert source.info.image_shape == (4, 6, 3)
    train, test = source.load()
    assert (train.images.shape, test.images.shape) == ((18, 4, 6, 3), (2, 4, 6, 3))
    values = [*train.images[:, 0, 0, 2], *test.images[:, 0, 0, 2]]
    assert sorted(values) == list(range(0, 200, 10))


def test_images_are_decoded_once_per_preparation(tmp_path, monkeypatch):
    from hjepa_jax.data import tfds

    define_tiny_set("TinyKept", [("train", 6), ("test", 3)], (4, 4, 3))
    decoded, read = [], tfds._read_split
    monkeypatch.setattr(tfds, "_read_split", lambda *args: decoded.append(args[2]) or read(*args))
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
    [("TinyTest", [("test", 2)], ("x", "y"))],
)
def test_a_set_without_a_split_train_is_refused(tmp_path, name, splits, labels):
    define_tiny_set(name, splits, (4, 4, 3), labels)
    snake = name[:4].lower() + "_" + name[4:].lower()
    assert_refused(f"tfds:{snake}", "must be a set with a split train", data_dir=str(tmp_path))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a small data set that TFDS has prepared."""
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


@pytest.mark.slow
def test_prepared_cifar10_has_its_usual_facts():
    if "TFDS_DATA_DIR" not in os.environ:
        pytest.skip("set TFDS_DATA_DIR to a folder with the prepared CIFAR-10")
    source = open_here("tfds:cifar10", data_dir=os.environ["TFDS_DATA_DIR"])
    train, test = source.load()
    assert (source.info.num_train, source.info.num_test) == (50_000, 10_000)
    assert source.info.image_shape == (32, 32, 3)
    assert source.info.class_names[:3] == ("airplane", "automobile", "bird")
    assert train.images.shape == (50_000, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    # A copy that was re-encoded as JPEG may be less red and less blue by 0.005.
    means = train.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=0.006)


@pytest.mark.parametrize(("when", "has_validation"), [("never", True), ("always", False)])
def test_a_test_split_without_labels_is_skipped(tmp_path, capsys, when, has_validation):
    splits = [("train", 20), ("test", 6)] + [("validation", 5)] * has_validation
    define_tiny_set(f"Tiny{when.title()}", splits, (4, 6, 3), unlabelled="test")
    options = {"data_dir": str(tmp_path), "streaming": Streaming(when)}
    train, test = open_here(f"tfds:tiny_{when}", **options).load()
    assert (len(train.labels), len(test.labels)) == ((20, 5) if has_validation else (18, 2))
    assert min(test.labels) >= 0
    said = capsys.readouterr().err
    assert ("in split validation" if has_validation else "held out, by class") in said
