"""A run on images of 48x80 pixels, from training to features: no part needs square images."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import hjepa_jax
from hjepa_jax.config import base_config, build
from hjepa_jax.config.sizes import grid_of
from hjepa_jax.config.validation import validate
from hjepa_jax.data.base import Split, fitted
from hjepa_jax.data.npz import save_npz
from hjepa_jax.data.shapes import create_shapes
from hjepa_jax.errors import InputError
from hjepa_jax.exchange.export import export
from hjepa_jax.models.positions import sincos2d_positions
from hjepa_jax.reporting import image_figures
from hjepa_jax.reporting.snapshot import build_snapshot_fn
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.scores import read_probe_json
from hjepa_jax.training import train, warm_start
from tests.conftest import draw_small, make_tiny_config
from tests.programs import shorten_probes

SIZE = (48, 80)


def stretched(split):
    images = [Image.fromarray(image).resize(SIZE[::-1]) for image in split.images]
    return Split(np.stack([np.asarray(image) for image in images]), split.labels)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "wide.npz"
    save_npz(path, *map(stretched, create_shapes(240, 60, seed=0)))
    c = make_tiny_config(f"npz:{path}").unlock()
    c.data.image_size, c.model.patch_size = SIZE, 8
    c.model.pyramid = "add"
    c.data.local_views, c.data.local_size, c.data.local_patches = 1, 0.5, 0.5
    c.mask.kind, c.mask.scale = "hierarchical", (0.1, 0.3)
    c.loss.agreement_weight, c.loss.regularizer, c.model.projection = 1.0, "none", (16, 8)
    c.eval.probe_at_end = c.log.report = True
    return c.lock()


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "wide"
    with pytest.MonkeyPatch.context() as patch:
        draw_small(patch, dpi=30)
        shorten_probes(patch)
        train.train_and_evaluate(config, workdir)
    return workdir


@pytest.mark.slow
def test_a_run_has_a_grid_of_its_own_shape_probes_and_a_report(config, workdir):
    assert grid_of(config) == (6, 10)
    assert build.build_masks(config).num_patches == 60
    assert build.build_local_views(config).augment.image_size == (24, 40)
    assert json.loads((workdir / "config.json").read_text())["data"]["image_size"] == [48, 80]
    rows = read_probe_json(workdir / "probe.json")
    assert {row["protocol"] for row in rows} >= {"linear", "knn"}
    assert "`[48, 80]`" in (workdir / "report.md").read_text()


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(config, workdir, tmp_path):
    parts = tmp_path / "wide"
    shutil.copytree(workdir, parts)
    shutil.rmtree(parts / "checkpoints/6")
    (parts / "probe.json").unlink()
    changed = config.copy_and_resolve_references().unlock()
    changed.eval.probe_at_end = changed.log.report = False
    train.train_and_evaluate(changed, parts)
    states = [load_state(each)[1] for each in (workdir, parts)]  # with online and EMA parameters
    assert [int(state.step) for state in states] == [6, 6]
    jax.tree.map(np.testing.assert_array_equal, *states)
    whole, again = (read_metrics(each / "metrics.jsonl") for each in (workdir, parts))
    assert [line["train/loss"] for line in whole if "train/loss" in line] == [
        line["train/loss"] for line in again if "train/loss" in line
    ]


@pytest.mark.slow
def test_pictures_have_the_shape_of_the_image(config, workdir):
    model, state, _ = load_state(workdir)
    images = stretched(create_shapes(3, 1, seed=1)[0]).images
    snapshot = jax.jit(build_snapshot_fn(config, model))(state.params, state.target_params, images)
    found = jax.device_get(snapshot)
    assert [x.shape for x in found.states] == [(3, 6, 10), (3, 3, 5)]
    assert found.tokens[1].shape == (3, 3, 5, 16)
    assert found.rollout.shape == (3, 6, 10)
    figures = image_figures.snapshot_figures(found)
    assert figures["masks"].axes[3].images[0].get_array().shape == (*SIZE, 3)
    assert figures["attention"].axes[3].images[0].get_array().shape == (6, 10)


@pytest.mark.slow
def test_features_and_tokens_of_images_of_any_shape(workdir, tmp_path):
    encoder = hjepa_jax.load(workdir)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 100, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    of_file = encoder.tokens(tmp_path / "photo.png")
    assert of_file.shape == (1, 6, 10, 16)
    np.testing.assert_allclose(of_file, encoder.tokens(fitted(photo, SIZE)), atol=1e-5)
    export(workdir, tmp_path / "exported")
    again = hjepa_jax.load(tmp_path / "exported").tokens(tmp_path / "photo.png")
    np.testing.assert_allclose(of_file, again, atol=1e-5)
    with pytest.raises(InputError, match="has only square images"):
        export(workdir, tmp_path / "timm", layout="timm")


def test_positions_are_resampled_for_a_transposed_grid():
    table, token = jnp.asarray(sincos2d_positions((6, 10), 16)), jnp.ones((1, 1, 16))
    params = {"positions": {"embedding": table}, "mask_token": token}
    found = warm_start.on_grid(params, (6, 10), (10, 6))
    turned = found["positions"]["embedding"]
    assert turned.shape == table.shape
    # The first of 6 columns lies a third of the way from the first to the second of 10 columns.
    np.testing.assert_allclose(turned[0], (2 * table[0] + table[1]) / 3, atol=1e-5)
    assert found["mask_token"] is token
    assert warm_start.on_grid(params, (6, 10), (6, 10))["positions"]["embedding"] is table


@pytest.mark.parametrize(
    ("size", "rule"),
    [
        ((48, 82), "must be a multiple of model.patch_size=4"),
        ((48, 0), "must be at least 1 and at most 4096 pixels"),
        ((48, 80, 3), r"must be a whole number, or two: \(height, width\)"),
        ((48.0, 80.0), "must be a whole number, or two"),
    ],
)
def test_a_wrong_size_is_refused(size, rule):
    config = base_config()
    config.data.image_size = size
    with pytest.raises(InputError, match=rf"^data.image_size=.*{rule}"):
        validate(config)
