"""Images without labels: all sources read them, training is the same, labels are not probed."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa_jax.data.npz import save_npz
from hjepa_jax.data.records import Streaming
from hjepa_jax.data.shapes import create_shapes
from hjepa_jax.data.sources import open_source
from hjepa_jax.errors import InputError
from hjepa_jax.feature_file import write_features
from hjepa_jax.reporting.publish import write_report
from hjepa_jax.training import train
from tests.conftest import make_tiny_config
from tests.test_tfds_source import define_tiny_set


def opened(source, **options):
    return open_source(str(source), data_dir=None, image_size=4, **options)


def write(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (i % 250, 20, 30)).save(root / name)


def metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k.startswith("train/")} for x in lines]


FLAT = [f"{i}.png" for i in range(10)]
NESTED = ["9.png", *[f"a/{i}.png" for i in range(4)], *[f"a/b/c/{i}.png" for i in range(5)]]


@pytest.mark.parametrize(
    ("kind", "names", "counts"),
    [
        ("folder", FLAT, (9, 1)),
        ("images", FLAT, (9, 1)),
        ("images", NESTED, (9, 1)),
        ("folder", [f"{split}/{i}.png" for split in ("train", "val") for i in range(3)], (3, 3)),
        ("images", [f"{split}/{i}.png" for split in ("train", "val") for i in range(3)], (3, 3)),
        ("images", ["train/x/0.png", "train/1.png", "test/2.png", "test/y/3.png"], (2, 2)),
    ],
)
def test_folders_without_classes_have_no_labels(tmp_path, capsys, kind, names, counts):
    write(tmp_path, *names)
    source = opened(f"{kind}:{tmp_path}")
    train_split, test_split = source.load()
    assert (len(train_split.images), len(test_split.images)) == counts
    assert train_split.labels is None
    assert test_split.labels is None
    assert source.info.class_names == ()
    assert sorted(train_split.names + test_split.names) == sorted(names)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; no labels")


def test_the_kind_decides_whether_sub_folders_are_classes(tmp_path, capsys):
    names = [f"{year}/{i}.png" for year in (2019, 2020) for i in range(10)]
    write(tmp_path, *names)
    labelled, unlabelled = (opened(f"{kind}:{tmp_path}") for kind in ("folder", "images"))
    assert labelled.info.class_names == ("2019", "2020")
    assert unlabelled.info.class_names == ()
    # Both hold out the same test images, so that labels can be added later.
    for one, other in zip(labelled.load(), unlabelled.load(), strict=True):
        assert one.names == other.names
        np.testing.assert_array_equal(one.images, other.images)


def test_folders_of_one_image_each_hold_some_out(tmp_path):
    write(tmp_path, *[f"{i}/0.png" for i in range(20)])
    train_split, test_split = opened(f"images:{tmp_path}").load()
    assert (len(train_split.names), len(test_split.names)) == (18, 2)


def test_a_folder_without_any_image_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(InputError, match="there is no image in"):
        opened(f"images:{tmp_path}")


@pytest.mark.parametrize("kind", ["folder", "images"])
def test_unlabelled_folders_can_be_streamed(tmp_path, kind):
    write(tmp_path, *FLAT)
    source = opened(f"{kind}:{tmp_path}", streaming=Streaming("always"))
    assert source.num_images == 9
    assert source.records is not None
    resident, _ = opened(f"{kind}:{tmp_path}").load()
    for row, image in enumerate(resident.images):
        np.testing.assert_array_equal(source.records.read(row), image)


@pytest.mark.parametrize("test", ["", "test_images", "val_images", "test_images test_labels"])
def test_npz_files_may_hold_images_alone(tmp_path, capsys, test):
    images = np.arange(20 * 12, dtype=np.uint8).reshape(20, 2, 2, 3)
    arrays: Any = dict(zip(test.split(), (images[:5], np.zeros(5, int)), strict=False))
    np.savez(tmp_path / "data.npz", train_images=images, **arrays)
    source = opened(f"npz:{tmp_path}/data.npz")
    splits = source.load()
    assert [len(split.images) for split in splits] == ([20, 5] if test else [18, 2])
    assert [split.labels for split in splits] == [None, None]
    assert "; no labels" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["never", "always"])
@pytest.mark.parametrize("labels", [("x", "y"), None])
def test_tfds_sets_may_have_no_labels(tmp_path, capsys, when, labels):
    """The training labels are all -1, or there is no class feature."""
    name = f"Bare{when.title()}{'Minus' if labels else 'None'}"
    define_tiny_set(name, [("train", 20), ("test", 6)], (4, 6, 3), labels, unlabelled="train")
    snake = f"tfds:bare_{when}_{'minus' if labels else 'none'}"
    options = {"data_dir": str(tmp_path), "image_size": 8, "streaming": Streaming(when)}
    splits = open_source(snake, **options).load()
    assert [len(split.images) for split in splits] == [20, 6]
    assert [split.labels for split in splits] == [None, None]
    assert "no labels" in capsys.readouterr().err


def test_a_bare_path_is_answered_with_the_right_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "x.npz").touch()
    with pytest.raises(InputError, match=r"did you mean folder:photos \(or images:photos, without"):
        opened("photos")
    with pytest.raises(InputError, match=r"did you mean npz:x\.npz\?"):
        opened("x.npz")


@pytest.fixture(scope="module")
def labelled_run(shapes_folder, tmp_path_factory):
    """Metrics of a run on a folder with classes."""
    workdir = tmp_path_factory.mktemp("labelled")
    train.train_and_evaluate(make_tiny_config(f"folder:{shapes_folder}"), workdir)
    return metrics(workdir)


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures")
def test_losses_without_labels_are_the_same_and_nothing_is_scored(
    labelled_run, shapes_folder, tmp_path, capsys
):
    flat = tmp_path / "flat"
    for path in shapes_folder.glob("*/*/*"):
        split, label, name = path.relative_to(shapes_folder).parts
        (flat / split).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, flat / split / f"{label}_{name}")
    config = make_tiny_config(f"folder:{flat}")
    config.eval.probe_at_end = True
    rows = train.train_and_evaluate(config, tmp_path / "run")
    assert metrics(tmp_path / "run") == labelled_run
    assert {row["protocol"] for row in rows} == {"quality"}
    said = capsys.readouterr().out
    assert said.count("has no labels") == 2  # at the start, and instead of the probes
    assert "top1" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    write_report([tmp_path / "run"], tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "The images have no labels, or one class" in report
    assert "Nearest neighbours" in report
    assert "Confusion" not in report
    assert "100.00 %" not in report
    assert "k-NN accuracy rose" not in report


@pytest.mark.slow
def test_the_explicit_kind_trains_the_same_too(labelled_run, shapes_folder, tmp_path):
    train.train_and_evaluate(make_tiny_config(f"images:{shapes_folder}"), tmp_path)
    assert metrics(tmp_path) == labelled_run


@pytest.mark.slow
def test_one_class_is_not_scored(tmp_path, capsys):
    splits = create_shapes(80, 20, seed=3)
    save_npz(tmp_path / "one.npz", *(type(x)(x.images[:, ::2, ::2], 0 * x.classes) for x in splits))
    config = make_tiny_config(f"npz:{tmp_path}/one.npz")
    config.train.num_steps = 2
    train.train_and_evaluate(config, tmp_path / "run")
    assert "has one class: no k-NN score during training" in capsys.readouterr().out
    assert "knn" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_features_of_unlabelled_images_are_written(tiny_run, tmp_path):
    write(tmp_path / "photos", *FLAT)
    shapes = write_features(str(tiny_run), str(tmp_path / "photos"), str(tmp_path / "x.npz"))
    assert shapes["train_level_0"][0] + shapes["test_level_0"][0] == 10
    assert not any("labels" in name or "rows" in name for name in shapes)
    with np.load(tmp_path / "x.npz") as arrays:
        trained_on, _ = opened(f"folder:{tmp_path}/photos").load()
        assert tuple(arrays["train_files"]) == trained_on.names


@pytest.mark.slow
@pytest.mark.usefixtures("short_probes")
def test_eval_data_scores_a_run_on_unlabelled_images(shapes_folder, shapes_npz, tmp_path):
    config = make_tiny_config(f"images:{shapes_folder}")
    config.eval.data = shapes_npz
    config.eval.probe_at_end = True
    rows = train.train_and_evaluate(config, tmp_path)
    assert {(row["protocol"], row["data"]) for row in rows} == {
        ("linear", shapes_npz), ("knn", shapes_npz)
    }  # fmt: skip
    assert "eval/knn_top1" in (tmp_path / "metrics.jsonl").read_text()
    assert {row["train_size"] for row in rows} == {240}


def test_eval_data_without_labels_is_refused(shapes_folder, shapes_npz, tmp_path, capsys):
    config = make_tiny_config(shapes_npz)
    for source, rule in ((f"images:{shapes_folder}", "has no labels"), ("npz:/no", "must name")):
        config.eval.data = source
        with pytest.raises(InputError, match=f"eval.data='{source}': {rule}"):
            train.train_and_evaluate(config, tmp_path)
    assert not [*tmp_path.iterdir()]
