"""Features of images: the command and the Python API agree, and keep the data split of the run."""

import functools
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

import hjepa_jax
from hjepa_jax import api, feature_file
from hjepa_jax.config import Config, build
from hjepa_jax.data.given import GivenImages
from hjepa_jax.data.records import Labelled
from hjepa_jax.data.shapes import create_shapes
from hjepa_jax.errors import InputError
from hjepa_jax.exchange.export import export
from hjepa_jax.method.window import empty_window, make_averages
from hjepa_jax.runs import checkpoint, run
from hjepa_jax.runs.load import load_encoder
from hjepa_jax.runs.record import make_record
from hjepa_jax.runs.workdir import load_config, prepare_workdir
from tests.conftest import make_tiny_config

RNG = np.random.default_rng(0)
SIZES = [(16, 16), (40, 20), (30, 70), (64, 48), (300, 200), (15, 33), (16, 17), (90, 16)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> pathlib.Path:
    """Photos of several sizes in two classes without a test split, and one broken file."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(40):
        height, width = SIZES[i % len(SIZES)]
        small = Image.fromarray(RNG.integers(256, size=(4, 4, 3), dtype=np.uint8))
        path = root / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        small.resize((width, height), Image.Resampling.BICUBIC).save(path)
    (root / "a" / "99.png").write_text("no")
    return root


def random_like(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype.kind != "f":
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jnp.asarray(RNG.normal(scale=0.3, size=leaf.shape), leaf.dtype)


def make_run(workdir: pathlib.Path, source: str, **fields: object) -> Config:
    """Makes a run with one checkpoint of random numbers, without training."""
    c = make_tiny_config(source)
    c.update_from_flattened_dict({"eval.batch_size": 64, **fields})
    opened = run.open_config_source(c)
    schedules = build.build_schedules(c, opened.num_images)
    prepare_workdir(c, workdir, make_record(c, opened, schedules, fingerprint="all-0"))
    tx = build.build_optimizer(c, schedules)
    create = build.build_create_state(c, build.build_model(c), tx)
    state = jax.tree.map(random_like, jax.eval_shape(create))
    window = empty_window(make_averages(["loss"]), batch_size=16, width=16)
    with checkpoint.Checkpoints(workdir, config=c, owner=True) as checkpoints:
        checkpoints.save(state, window, scores={})
    return c


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, photos) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, f"folder:{photos}", seed=1)
    return folder


def first_pixel(_, images):
    """Replaces an encoder: its only feature is the first pixel of an image."""
    return {"x": images[:, 0, 0, :1].astype(np.float32)}


def write(workdir, source, output) -> dict[str, np.ndarray]:
    shapes = feature_file.write_features(str(workdir), str(source), str(output))
    with np.load(output) as file:
        found = dict(file)
    assert {name: array.shape for name, array in found.items()} == shapes
    return found


def test_loading_a_run_logs_nothing(workdir, caplog):
    hjepa_jax.load(workdir)
    assert not caplog.messages


@pytest.fixture(scope="module")
def written(workdir, photos, tmp_path_factory) -> dict[str, np.ndarray]:
    return write(workdir, photos, tmp_path_factory.mktemp("out") / "features.npz")


NAMES = ("level_0", "level_1", "summary")


def test_python_gives_the_features_of_the_command(workdir, photos, written):
    """Photos of several sizes are given as files, uint8 and floats, one by one and in a list."""
    encoder = hjepa_jax.load(workdir)
    files = [*written["train_files"], *written["test_files"]]
    assert len(files) == 40
    images = [np.asarray(Image.open(photos / name)) for name in files]
    expected = {n: np.concatenate([written[f"train_{n}"], written[f"test_{n}"]]) for n in NAMES}
    ways = {
        "paths": [str(photos / name) for name in files],
        "uint8": images,
        "floats": [image / 255.0 for image in images],
        "float32": [image.astype(np.float32) / 255 for image in images],
    }
    for way, given in ways.items():
        found = encoder.embed(given)
        assert set(found) == {*NAMES}
        for name in NAMES:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=way)
    for row in (0, 3):
        for given in (images[row], images[row][None], images[row] / 255.0, photos / files[row]):
            found = encoder.embed(given)["level_0"]
            np.testing.assert_allclose(found, expected["level_0"][row : row + 1], atol=1e-5)
    assert np.abs(expected["level_0"][0] - expected["level_0"][1]).max() > 0.01


def test_an_npz_of_photos_has_the_same_features_as_the_files(workdir, photos, tmp_path):
    """All images have one size, but not the size of the encoder."""
    files = [photos / "ab"[i % 2] / f"{i:02}.png" for i in range(40) if SIZES[i % 8] == (30, 70)]
    images, labels = np.stack([np.asarray(Image.open(f)) for f in files]), np.zeros(5, np.int32)
    arrays = {"train_images": images, "train_labels": labels}
    np.savez(tmp_path / "in.npz", **arrays, test_images=images[:2], test_labels=labels[:2])
    found = write(workdir, tmp_path / "in.npz", tmp_path / "out.npz")
    expected = hjepa_jax.load(workdir).embed([str(f) for f in files])
    for name, array in expected.items():
        np.testing.assert_allclose(found[f"train_{name}"], array, atol=1e-5)
        np.testing.assert_allclose(found[f"test_{name}"], array[:2], atol=1e-5)
    assert "train_files" not in found


@pytest.mark.parametrize("streaming", ["auto", "always"])
@pytest.mark.parametrize("seed", [0, 2])
def test_the_run_never_saw_the_test_files(photos, workdir, tmp_path, seed, streaming, monkeypatch):
    """Covers several seeds, a broken file and streamed runs. The encoder does not matter."""
    config = load_config(workdir)
    with config.unlocked():
        config.seed, config.data.streaming = seed, streaming
    monkeypatch.setattr("hjepa_jax.feature_file.load_config", lambda _: config)
    monkeypatch.setattr(api, "load", lambda *_: api.Encoder(None, 16, 64, first_pixel))
    found = write(workdir, photos, tmp_path / "features.npz")
    source = run.open_config_source(config)
    train, test = source.load()
    seen = (
        [os.path.relpath(f, photos) for f in source.records.files]
        if source.records
        else train.names
    )
    assert found["test_files"].tolist() == list(test.names)
    assert not set(found["test_files"]) & set(seen)
    for name, split in (("train", train), ("test", test)):
        np.testing.assert_array_equal(found[f"{name}_labels"], split.labels)
        np.testing.assert_array_equal(found[f"{name}_x"], split.images[:, 0, 0, :1])


def test_every_format_holds_the_same_rows(workdir, photos, written, tmp_path):
    """npy and Parquet files have the rows in file order, and can hold the tokens of all patches.

    Parquet files also have the file names and the split.
    """
    options = {"tokens": True, "features": ("level_1", "summary")}
    feature_file.write_features(str(workdir), str(photos), f"{tmp_path}/x.parquet", **options)
    table = parquet.read_table(tmp_path / "x.parquet")
    assert {*table.column_names} == {"level_1", "summary", "tokens", "labels", "files", "split"}
    rows = table.to_pylist()
    assert [row["files"] for row in rows] == sorted(row["files"] for row in rows)
    for split in ("train", "test"):
        chosen = [row for row in rows if row["split"] == split]
        assert [row["files"] for row in chosen] == written[f"{split}_files"].tolist()
        for name in ("level_1", "summary", "labels"):
            found = np.array([row[name] for row in chosen])
            np.testing.assert_array_equal(found, written[f"{split}_{name}"])

    feature_file.write_features(str(workdir), str(photos), f"{tmp_path}/x.npy", tokens=True)
    tokens = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(tokens.reshape(40, -1), [row["tokens"] for row in rows])
    expected = hjepa_jax.load(workdir).tokens([photos / row["files"] for row in rows])
    np.testing.assert_allclose(tokens, expected, atol=1e-5)
    assert tokens.shape == (40, 4, 4, 16)

    feature_file.write_features(str(workdir), str(photos), f"{tmp_path}/y.npy")
    together = np.load(tmp_path / "y.npy")
    assert together.shape == (40, 16 + 16 + 32)
    train = [row["split"] == "train" for row in rows]
    beside = np.concatenate([written[f"train_{name}"] for name in NAMES], axis=1)
    np.testing.assert_array_equal(together[train], beside)
    assert {path.name for path in tmp_path.iterdir()} == {"x.parquet", "x.npy", "y.npy"}


def test_an_unknown_feature_is_refused_before_any_work(workdir, photos, tmp_path):
    names, output = ["level_0", "level_9"], f"{tmp_path}/x.npz"
    with pytest.raises(InputError, match=r"^--features='level_9': must be some of level_0, level_"):
        feature_file.write_features(str(workdir), str(photos), output, features=names)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("other", [False, True], ids=["the same", "another encoder"])
def test_an_interrupted_command_goes_on_without_a_lost_or_doubled_row(
    other, workdir, photos, tmp_path, monkeypatch
):
    """Complete shards are kept, unless the encoder has changed."""
    monkeypatch.setattr(feature_file, "SHARD_ROWS", 8)
    batches = []

    def embed(params, images):
        if len(batches) == 2 and params == 0:
            raise KeyboardInterrupt
        batches.append(len(images))
        return {"x": images[:, 0, 0, :1].astype(np.float32)}

    def run_with(params):
        encoder = api.Encoder(params, 16, 8, embed)
        monkeypatch.setattr(api, "load", lambda *_: encoder)
        return write(workdir, photos, tmp_path / "x.npz")

    with pytest.raises(KeyboardInterrupt):
        run_with(0)
    assert [path.name for path in tmp_path.iterdir()] == [".x.npz.partial"]
    (tmp_path / ".x.npz.partial" / "00000002.npz.99.partial").touch()  # from a save that was killed
    assert len(batches) == 2
    if not other:
        batches.append(0)  # so that it is not interrupted again
    found = run_with(int(other))
    assert len(batches) == 2 + (6 if other else 1 + 4)
    files = [*found["train_files"], *found["test_files"]]
    assert len(files) == len({*files}) == 40
    for split in ("train", "test"):
        images = [GivenImages([photos / f], 16).read(0) for f in found[f"{split}_files"]]
        np.testing.assert_array_equal(found[f"{split}_x"], np.stack(images)[:, 0, 0, :1])
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_a_folder_with_its_own_split_keeps_it(shapes_folder, workdir, tmp_path):
    found = write(workdir, shapes_folder, tmp_path / "features.npz")
    assert (len(found["train_files"]), len(found["test_files"])) == (160, 40)
    assert all(name.startswith("test/") for name in found["test_files"])


def save_arrays(folder: pathlib.Path) -> np.ndarray:
    """Writes x.npz and x.npy with 6 images each. Their size differs from the encoder's."""
    images = RNG.integers(256, size=(6, 20, 24, 3), dtype=np.uint8)
    np.savez(folder / "x.npz", images=images, labels=np.arange(6) % 2)
    np.save(folder / "x.npy", images[::-1])
    return images


@pytest.mark.parametrize("suffix", ["npz", "parquet", "npy"])
def test_a_mix_of_inputs_is_one_list_in_the_order_given(
    suffix, workdir, photos, tmp_path, monkeypatch
):
    """Mixes images, a folder with a broken file, and arrays. The command is interrupted once."""
    monkeypatch.setattr(feature_file, "SHARD_ROWS", 8)
    arrays = save_arrays(tmp_path)
    inputs = [f"{tmp_path}/x.npz", f"{photos}/b/01.png", f"{photos}/b/03.png", str(photos),
              f"npy:{tmp_path}/x.npy", f"{photos}/a/00.png"]  # fmt: skip
    files = [photos / "ab"[i % 2] / f"{i:02}.png" for i in range(40)]
    tree = [path for which in "ab" for path in files if path.parent.name == which]
    expected = [*arrays, files[1], files[3], *tree, *arrays[::-1], files[0]]
    output = tmp_path / f"out.{suffix}"
    embed, calls = feature_file._embed, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(*arguments)

    monkeypatch.setattr(feature_file, "_embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        feature_file.write_features(str(workdir), inputs, str(output))
    shapes = feature_file.write_features(str(workdir), inputs, str(output))
    found = (
        dict(np.load(output)) if suffix == "npz"
        else parquet.read_table(output).to_pydict() if suffix == "parquet"
        else {"level_0": np.load(output)[:, :16]}
    )  # fmt: skip
    assert len(calls) == 1 + 4  # array, 43 files, array, file; the first two only once
    reference = hjepa_jax.load(workdir).embed(expected)["level_0"]
    np.testing.assert_allclose(found["level_0"], reference, atol=1e-5)
    if suffix != "npy":
        names = [f"{tmp_path}/x.npz[{i}]" for i in range(6)] + inputs[1:3] + [*map(str, tree)]
        names += [f"npy:{tmp_path}/x.npy[{i}]" for i in range(6)] + inputs[-1:]
        assert [*found["files"]] == names
        assert {*found} == {*NAMES, "files"}
        assert {shape[0] for shape in shapes.values()} == {len(expected)}


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
def test_the_rows_of_an_array_without_a_split_keep_its_order(workdir, photos, name, tmp_path):
    arrays = save_arrays(tmp_path)
    given = arrays if name == "x.npz" else arrays[::-1]
    feature_file.write_features(str(workdir), f"{tmp_path}/{name}", f"{tmp_path}/out.npy")
    expected = hjepa_jax.load(workdir).embed(given)["level_0"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy")[:, :16], expected, atol=1e-5)


def test_an_exported_folder_gives_the_features_of_the_run(workdir, photos, written, tmp_path):
    export(workdir, tmp_path / "exported")
    found = write(tmp_path / "exported", photos, tmp_path / "x.npz")
    assert found.keys() == written.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(found[name], value)


def test_the_sheet_shows_each_image_with_its_nearest(workdir, photos, tmp_path):
    """The page is self-contained. Order and cosines agree with a search in full precision."""
    inputs = [str(photos / "a"), str(photos / "b")]
    options = {"neighbours": 3, "features": ("level_1", "level_0")}
    feature_file.write_features(str(workdir), inputs, f"{tmp_path}/x.npz", **options)
    page = (tmp_path / "x.html").read_text()
    groups = [
        re.findall(r"<figcaption>(?:(-?[\d.]+) )?(.*?)</figcaption>", section)
        for section in page.split("<section>")[1:]
    ]
    with np.load(tmp_path / "x.npz") as file:
        x, names = file["level_1"].astype(np.float64), file["files"].tolist()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosine = x @ x.T - 9 * np.eye(len(x))
    assert len(groups) == feature_file.NUM_QUERIES
    assert len({group[0][1] for group in groups}) == len(groups)
    for (_, query), *found in groups:
        row = cosine[names.index(query)]
        nearest = np.argsort(-row)[:3]
        assert [name for _, name in found] == [names[i] for i in nearest]
        np.testing.assert_allclose([float(c) for c, _ in found], row[nearest], atol=6e-4)
    assert page.count("data:image/jpeg") == 4 * len(groups)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    with pytest.raises(InputError, match=r"^--neighbours=41: must be at most 40, the other images"):
        feature_file.write_features(str(workdir), inputs, f"{tmp_path}/y.npz", neighbours=41)
    assert not (tmp_path / "y.npz").exists()


class Counted:
    """Images that count how many were decoded."""

    image_shape, decoded = (16, 16, 3), 0
    __len__ = lambda self: 1000

    def read(self, row):
        self.decoded += 1
        return np.full(self.image_shape, row % 256, np.uint8)


def test_no_more_than_a_batch_is_decoded_at_a_time():
    images, calls = Counted(), []

    def embed(_, batch):
        calls.append(images.decoded)
        return first_pixel(_, batch)

    features, rows, errors = api.Encoder(None, 16, 64, embed).embed_records(images)
    assert calls == [min(64 * (i + 1), 1000) for i in range(16)]
    assert features["x"][:, 0].tolist() == [row % 256 for row in range(1000)]
    assert (len(rows), errors) == (1000, [])


def test_few_images_make_a_small_batch(workdir):
    sizes = []

    def embed(_, batch):
        sizes.append(len(batch))
        return first_pixel(_, batch)

    encoder = api.Encoder(None, 4, 64, embed)
    for num in (1, 3, 64, 65):
        assert len(encoder.embed(np.zeros((num, 4, 4, 3), np.uint8))["x"]) == num
    devices = len(jax.local_devices())
    assert sizes == [-(-size // devices) * devices for size in (1, 4, 64, 64, 64)]


# The work directory does not exist, so the output must be refused before any work.
@pytest.mark.parametrize(
    ("output", "rule"),
    [
        ("x.csv", "must end in .npz"), ("x", "must end in .npz"), ("x.npz2", "must end in .npz"),
        ("folder.npz", "this is a folder"), ("nowhere/x.npz", "No such file or directory"),
        ("file/x.npz", "Not a directory"), ("in.npz", "must be another file than --input"),
        ("./folder.npz/../in.npz", "must be another file than --input"),
        ("link.npz", "must be another file than --input"),
    ],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path, output, rule):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "in.npz").touch()
    (tmp_path / "link.npz").symlink_to(tmp_path / "in.npz")
    with pytest.raises(InputError, match=f"^--output=.*{rule}"):
        feature_file.write_features("nowhere", f"{tmp_path}/in.npz", f"{tmp_path}/{output}")
    assert (tmp_path / "in.npz").read_text() == ""


@pytest.mark.parametrize(
    ("source", "rule"),
    [("nowhere", "there is no such file"), ("x.csv", "this is no BMP, .* image"),
     ("nowhere.npz", "there is no such file")],
)  # fmt: skip
def test_an_invalid_input_is_refused_at_once(tmp_path, source, rule):
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(
        InputError, match=rf"^--input=.*must be an image, a folder of images.*{rule}"
    ):
        feature_file.write_features("nowhere", f"{tmp_path}/{source}", f"{tmp_path}/out.npz")


def test_arrays_larger_than_the_memory_are_refused(workdir, tmp_path, monkeypatch):
    images, labels = np.zeros((4, 16, 16, 3), np.uint8), np.arange(4)
    np.savez(tmp_path / "in.npz", train_images=images, train_labels=labels)
    monkeypatch.setattr("hjepa_jax.data.base.available_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"^--input=.*needs 0.0 GiB of memory for its images"):
        feature_file.write_features(str(workdir), f"{tmp_path}/in.npz", f"{tmp_path}/out.npz")


def test_errors_of_the_input_name_the_flag(workdir, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"^--input='.*empty': .*one sub-folder per class"):
        feature_file.write_features(str(workdir), f"{tmp_path}/empty", f"{tmp_path}/out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_home_is_expanded_in_every_path(workdir, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, target in (("run", workdir), ("photos", photos)):
        (tmp_path / name).symlink_to(target)
    feature_file.write_features("~/run", "~/photos", "~/out.npz")
    assert (tmp_path / "out.npz").exists()
    assert hjepa_jax.load("~/run").image_size == 16


def test_build_embed_fn_agrees_and_refuses_other_dtypes(workdir):
    images = create_shapes(8, 1, seed=0)[0].images[:, ::2, ::2]
    model, params = load_encoder(workdir)
    embed = jax.jit(build.build_embed_fn(load_config(workdir), model))
    expected = hjepa_jax.load(workdir).embed(images)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, dict(embed(params, images)), expected)
    for dtype in (np.float16, np.int8, np.int32, bool):
        with pytest.raises(InputError, match=r"^images='.*must be uint8, uint16, float32 here; hj"):
            embed(params, np.zeros((2, 16, 16, 3), dtype))


def test_rows_with_corrected_labels_are_made_again():
    encoder = api.Encoder(0, 16, 8, first_pixel)
    images = GivenImages([np.zeros((16, 16, 3), np.uint8)] * 2, 16)
    first, again, other = (
        feature_file._made_from(encoder, [Labelled(images, labels, ())], (), False)
        for labels in np.array([[0, 1], [0, 1], [1, 1]], np.int32)
    )
    assert first == again != other
