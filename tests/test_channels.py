"""Images with any number of channels and 8, 16 or 32 bits, from every source to the report."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image

import hjepa_jax
from hjepa_jax.data.augment import Augment, resize_and_normalize
from hjepa_jax.data.pixels import fitted_pixels, pixel_statistics
from hjepa_jax.data.records import Streaming
from hjepa_jax.data.shapes import create_shapes
from hjepa_jax.data.sources import open_source
from hjepa_jax.errors import InputError
from hjepa_jax.exchange.export import export
from hjepa_jax.feature_file import write_features
from hjepa_jax.reporting.image_figures import as_pictures
from hjepa_jax.reporting.publish import write_report
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.training import train
from tests.conftest import draw_small, make_tiny_config
from tests.faults.test_kills import newest_checkpoint, state_and_lines
from tests.faults.test_resume import train_until
from tests.test_tfds_source import define_tiny_set

RNG = np.random.default_rng(0)


def opened(source, **options):
    return open_source(
        source, **{"data_dir": None, "image_size": 8, "num_channels": None, **options}
    )


def noise(n, channels, dtype):
    """Returns random images [n, 6, 8, C] with values over the range of the dtype."""
    if dtype == "float32":
        return RNG.normal(5, 100, (n, 6, 8, channels)).astype(np.float32)
    return RNG.integers(np.iinfo(dtype).max + 1, size=(n, 6, 8, channels), dtype=dtype)


@pytest.mark.parametrize("kind", ["npz", "npy", "npy streamed", "npy folder"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", ">u2"])
@pytest.mark.parametrize("channels", [1, 2, 4, 32])
def test_arrays_of_all_dtypes_are_read_unchanged(tmp_path, kind, dtype, channels):
    images = noise(20, channels, "uint16" if dtype == ">u2" else dtype).astype(dtype)
    labels = np.arange(20) % 2
    path = tmp_path / "x.npz"
    if kind == "npz":
        np.savez(path, train_images=images, train_labels=labels)
    else:
        path = tmp_path / "train_images.npy"
        np.save(path, images)
        if kind == "npy folder":
            np.save(tmp_path / "train_labels.npy", labels)
            path = tmp_path
    streaming = Streaming("always" if "streamed" in kind else "never")
    source = opened(f"{kind[:3]}:{path}", streaming=streaming)
    splits = source.load()
    assert source.info.image_shape == (6, 8, channels)
    assert source.info.dtype == np.dtype(dtype).name
    found = np.concatenate([split.images for split in splits])
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    assert sorted(map(bytes, found)) == sorted(map(bytes, images.astype(found.dtype)))
    assert (splits[0].labels is None) == (kind in ("npy", "npy streamed"))
    if source.records is not None:
        np.testing.assert_array_equal(source.records.read(3), splits[0].images[3])


@pytest.mark.parametrize(
    ("images", "options", "rule"),
    [
        (np.zeros((4, 6, 5, 33), np.uint8), {}, "1 to 32 channels, not uint8 with 33"),
        (np.zeros((4, 6, 5, 3)), {}, "must be uint8, uint16 or float32"),
        (np.zeros((4, 6, 5, 3), np.int16), {}, "must be uint8, uint16 or float32"),
        (np.full((4, 6, 5, 3), np.nan, np.float32), {}, "must be finite"),
        (np.zeros((4, 6, 5, 13), np.uint16), {"num_channels": 3}, "data.mean='3 numbers': must"),
        (np.zeros((4, 6), np.uint8), {}, r"must be \[n, H, W, C\]"),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_arrays_that_fit_no_model_are_refused(tmp_path, kind, images, options, rule):
    path = tmp_path / f"x.{kind}"
    if kind == "npz":
        np.savez(path, train_images=images)
    else:
        np.save(path, images)
    with pytest.raises(InputError, match=rule):
        opened(f"{kind}:{path}", **options).load()


@pytest.mark.parametrize("when", ["never", "always"])
@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "uint16"), ("F", "float32"), ("L", "uint8")])
@pytest.mark.parametrize("pages", [1, 13])
def test_tiff_folders_are_read(tmp_path, when, mode, dtype, pages):
    images = noise(10, pages, dtype)[:, :6, :6]
    for i, image in enumerate(images):
        first, *rest = (Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(pages))
        assert first.mode == mode
        first.save(tmp_path / f"{i}.tif", save_all=True, append_images=rest)
    options = {"streaming": Streaming(when), "image_size": 6, "num_channels": pages}
    train_split, test_split = opened(f"folder:{tmp_path}", **options).load()
    rows = [int(name[0]) for name in train_split.names + test_split.names]
    found = np.concatenate([train_split.images, test_split.images])
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, images[rows])


def test_a_file_of_another_kind_is_skipped_and_named(tmp_path, capsys):
    for i in range(5):
        Image.fromarray(np.full((6, 6), 300 * i, np.uint16)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (6, 6)).save(tmp_path / "+.png")  # sorts first
    train_split, test_split = opened(f"images:{tmp_path}").load()
    assert len(train_split.images) + len(test_split.images) == 5
    assert "it has 3 channels of uint8, and most images 1 channels of uint16" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("when", ["never", "always"])
def test_tfds_sets_may_have_16_bits(tmp_path, when):
    name = f"Deep{when.title()}"
    define_tiny_set(name, [("train", 20), ("test", 4)], (4, 6, 1), dtype=np.uint16)
    options = {"data_dir": str(tmp_path), "streaming": Streaming(when)}
    source = opened(f"tfds:deep_{when}", **options)
    train_split, _ = source.load()
    assert source.info.image_shape == (4, 6, 1)
    assert train_split.images.dtype == np.uint16
    assert sorted(train_split.images[:, 0, 0, 0]) == [10 * i for i in range(20)]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 13])
def test_pixel_statistics_match_numpy(channels, dtype):
    images = noise(50, channels, dtype)
    mean, std = pixel_statistics(images)
    scale = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    x = images.astype(np.float64) / scale
    np.testing.assert_allclose(mean, x.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, x.std(axis=(0, 1, 2)), rtol=1e-5)


def test_a_constant_channel_is_divided_by_one():
    assert pixel_statistics(np.full((3, 2, 2, 1), 51, np.uint8)) == ((0.2,), (1.0,))


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_the_same_pixels_in_other_dtypes_give_the_same_views(channels):
    """Compares 8 bits, the same pixels with 16 bits, and the same pixels as floats in [0, 1]."""
    images = RNG.integers(256, size=(2, 16, 16, channels), dtype=np.uint8)
    same = [images, images.astype(np.uint16) * 257, images.astype(np.float32) / 255]
    stats = {"mean": (0.5,) * channels, "std": (0.2,) * channels}
    augment = Augment(16, **stats, crop_scale=(0.3, 1), horizontal_flip=0.5, blur=0.5)
    rngs = jax.random.split(jax.random.PRNGKey(0), 2)
    for fn in (
        lambda x: augment(rngs, x), lambda x: resize_and_normalize(x, image_size=16, **stats),
    ):  # fmt: skip
        first, *others = (fn(jnp.asarray(x)) for x in same)
        assert first.shape == (2, 16, 16, channels)
        for other in others:
            np.testing.assert_allclose(other, first, atol=2e-6)


def test_floats_beyond_one_are_not_clipped():
    images = jnp.asarray(noise(2, 4, "float32"))
    x = resize_and_normalize(images, image_size=3, mean=(0.0,) * 4, std=(1.0,) * 4)
    assert float(jnp.abs(x).max()) > 20
    host = fitted_pixels(np.asarray(images[0]), 3)
    np.testing.assert_allclose(x[0], host, rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_pictures_of_any_channels_are_rgb(channels, dtype):
    images = noise(4, channels, dtype)
    shown = as_pictures(images)
    assert shown.shape == (4, 6, 8, 3)
    assert 0 <= shown.min() < 0.1
    assert 0.9 < shown.max() <= 1
    if channels == 1:
        np.testing.assert_array_equal(shown[..., 0], shown[..., 2])
    if (channels, dtype) == (3, "uint8"):
        np.testing.assert_array_equal(shown, images / np.float32(255))


def config_for(path):
    config = make_tiny_config(f"npz:{path}")
    config.data.mean = config.data.std = ("auto",)
    for name in ("brightness", "contrast", "saturation"):
        config.data[name] = 0.0
    return config


def save_shapes(path, channels, dtype):
    """Saves randomly coloured shapes with this many channels, in a narrow range of the dtype."""
    arrays = {}
    for name, split in zip(("train", "test"), create_shapes(120, 30, seed=4), strict=True):
        x = split.images[:, ::2, ::2].astype(np.float64)
        x = np.repeat(x, 5, axis=3)[..., :channels] * np.linspace(0.5, 1, channels)
        scale = {"uint8": 1, "uint16": 20, "float32": 3}[dtype]
        arrays[f"{name}_images"] = (scale * x - 300 * (dtype == "float32")).astype(dtype)
        arrays[f"{name}_labels"] = split.labels
    np.savez(path, **arrays)
    return arrays


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures", "short_probes")
@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (13, "uint16"), (3, "float32")])
def test_a_whole_run_on_other_images(tmp_path, channels, dtype):
    """Covers training, a second start and features; with 13 channels also probes and report."""
    arrays = save_shapes(tmp_path / "x.npz", channels, dtype)
    config = config_for(tmp_path / "x.npz")
    config.eval.probe_at_end = channels == 13
    rows = train.train_and_evaluate(config, tmp_path / "whole")
    assert {row["protocol"] for row in rows} == ({"linear", "knn"} if channels == 13 else set())
    stored = json.loads((tmp_path / "whole" / "config.json").read_text())["data"]
    mean, std = pixel_statistics(arrays["train_images"])
    assert (stored["mean"], stored["std"]) == ([*mean], [*std])
    train.train_and_evaluate(config, tmp_path / "whole")  # auto reuses the recorded numbers

    if channels == 13:
        write_report([tmp_path / "whole"], tmp_path / "whole")
        assert "Nearest neighbours" in (tmp_path / "whole" / "report.md").read_text()
    shapes = write_features(
        str(tmp_path / "whole"), str(tmp_path / "x.npz"), str(tmp_path / "features.npz")
    )
    assert shapes["train_level_0"] == (120, 16)
    if (channels, dtype) != (3, "float32"):  # `embed` takes floats in [0, 1] only
        found = hjepa_jax.load(tmp_path / "whole").embed(arrays["train_images"][:5])
        with np.load(tmp_path / "features.npz") as features:
            np.testing.assert_allclose(found["level_0"], features["train_level_0"][:5], atol=1e-5)
    _, state, _ = load_state(tmp_path / "whole", "last")
    leaves = jax.tree.leaves(state.params["context_encoder"])
    assert 16 * channels in {leaf.shape[0] for leaf in leaves if leaf.ndim == 2}  # 4 x 4 pixels


def save_folder(root, channels):
    """Saves 32x32 images: 16-bit TIFF with one page per channel, or 8-bit grey PNG."""
    for name, split in zip(("train", "test"), create_shapes(120, 30, seed=4), strict=True):
        for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = root / name / f"{label:02}" / f"{i:03}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            if channels == 1:
                Image.fromarray(image[..., 1]).save(path.with_suffix(".png"))
                continue
            scales = np.linspace(20, 200, channels)
            first, *rest = (
                Image.fromarray((image[..., c % 3] * scale).astype(np.uint16))
                for c, scale in enumerate(scales)
            )
            first.save(path, save_all=True, append_images=rest)


@pytest.mark.slow
@pytest.mark.usefixtures("short_probes")
@pytest.mark.parametrize(("channels", "when"), [(13, "never"), (1, "always")])
def test_a_whole_run_on_tiff_stacks_or_grey_pngs(tmp_path, monkeypatch, channels, when):
    """Covers crops from files twice as large, resume, probes, report, features and export."""
    draw_small(monkeypatch, dpi=30)
    save_folder(tmp_path / "files", channels)
    config, (whole, parts) = config_for(tmp_path), (tmp_path / "whole", tmp_path / "parts")
    config.data.source, config.data.streaming = f"folder:{tmp_path}/files", when
    config.data.num_workers, config.train.steps_per_call = 0, 1
    if channels == 1:
        config.data.mean, config.data.std = (0.5,), (0.25,)
    config.eval.probe_at_end = config.log.report = True
    rows = train.train_and_evaluate(config, whole)
    assert {row["protocol"] for row in rows} == {"linear", "knn"}
    assert {"masks.png", "pca.png", "neighbours.png"} <= {
        path.name for path in (whole / "figures").iterdir()
    }
    config.eval.probe_at_end = config.log.report = False
    train_until(config, parts, 4)
    assert newest_checkpoint(parts) < 6
    train.train_and_evaluate(config, parts)
    arrays, lines = state_and_lines(load_config(parts), parts)  # has numbers instead of auto
    expected_arrays, expected_lines = state_and_lines(load_config(whole), whole)
    jax.tree.map(np.testing.assert_array_equal, arrays, expected_arrays)
    trained = [{k: v for k, v in line.items() if "linear" not in k} for line in expected_lines]
    assert lines == trained

    write_features(str(whole), str(tmp_path / "files"), str(tmp_path / "features.npz"))
    export(whole, tmp_path / "out", layout="stablehlo")
    program = jax_export.deserialize(bytearray((tmp_path / "out/model.stablehlo").read_bytes()))
    image = open_source(
        f"folder:{tmp_path}/files", data_dir=None, image_size=16, num_channels=channels
    ).load()[0].images[:5]  # fmt: skip
    assert program.in_avals[0].dtype == image.dtype == ("uint16" if channels == 13 else "uint8")
    with np.load(tmp_path / "features.npz") as features:
        found = program.call(image)["level_0"]
        np.testing.assert_allclose(found, features["train_level_0"][:5], atol=1e-4)


def test_colours_need_rgb_and_all_fields_are_named_at_once(tmp_path):
    save_shapes(tmp_path / "x.npz", 13, "uint16")
    config = config_for(tmp_path / "x.npz")
    config.data.brightness, config.data.grayscale = 0.2, 0.1
    rule = r"data.brightness=0.2: needs three channels .* set data.brightness=0, data.grayscale=0$"
    with pytest.raises(InputError, match=rule):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_grey_images_still_become_rgb_with_three_means(tmp_path):
    save_shapes(tmp_path / "x.npz", 1, "uint8")
    source = opened(f"npz:{tmp_path}/x.npz", num_channels=3)
    assert source.info.image_shape == (16, 16, 3)
    assert dataclasses.replace(source.info, dtype="uint16").image_bytes == 16 * 16 * 3 * 2
