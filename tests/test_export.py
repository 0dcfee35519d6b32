"""Exported encoders: files, layouts and programs give the same features as the run's encoder."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import hjepa_jax
from hjepa_jax.errors import InputError
from hjepa_jax.exchange.convert import convert
from hjepa_jax.exchange.export import DTYPES, export
from hjepa_jax.exchange.hub import check_push
from hjepa_jax.runs.scores import write_probe_json
from tests.test_embed import make_run

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(256, size=(5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, shapes_npz):
    folder = tmp_path_factory.mktemp("runs") / "small"
    make_run(folder, shapes_npz, **{"model.num_registers": 1, "model.depth": 2})
    return folder


def assert_same_encoder(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    jax.tree.map(np.testing.assert_array_equal, one.embed(IMAGES), other.embed(IMAGES))


def test_an_encoder_file_gives_the_same_encoder_and_facts(workdir, tmp_path):
    files = export(workdir, tmp_path / "out")
    assert files == ["README.md", "config.json", "model.safetensors"]
    here, there = hjepa_jax.load(workdir), hjepa_jax.load(tmp_path / "out")
    assert_same_encoder(there, here)
    assert there.config == here.config
    assert there.info == here.info
    assert (here.info["width"], here.info["num_levels"], here.info["step"]) == (16, 2, 0)
    config = convert(tmp_path / "out" / "model.safetensors", tmp_path / "back", data="shapes")
    assert config.data.source == "shapes"
    assert_same_encoder(hjepa_jax.load(tmp_path / "back"), here)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# small" in card
    assert f"{here.info['parameters']:,}" in card
    with pytest.raises(InputError, match="must be a new or empty folder"):
        export(workdir, tmp_path / "out")


@pytest.mark.parametrize("data", [None, "npz:labelled.npz"])
def test_scores_are_those_of_the_exported_checkpoint(data, shapes_npz, tmp_path):
    """The run has a checkpoint at step 0, and scores at steps 0 and 9 and on other images."""
    make_run(tmp_path / "run", shapes_npz, **{"eval.data": data})
    row = {"protocol": "knn", "encoder": "target", "pool": "summary", "level": "all", "dim": 8}

    def score(top1, step, on):
        return row | {"top1": top1, "chosen": {"val_top1": top1}, "step": step, "data": on}

    rows = [score(0.9, 9, data or shapes_npz), score(0.8, 0, "other")]
    write_probe_json(tmp_path / "run" / "probe.json", rows)
    assert hjepa_jax.load(tmp_path / "run").info["scores"] == {}
    write_probe_json(tmp_path / "run" / "probe.json", [score(0.5, 0, data or shapes_npz)])
    assert hjepa_jax.load(tmp_path / "run").info["scores"] == {"knn": "trained 50.0 %"}


def test_float16_files_give_nearly_the_same_features(workdir, tmp_path):
    for dtype in DTYPES:
        export(workdir, tmp_path / dtype, dtype=dtype)
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in DTYPES]
    assert sizes[1] < 0.7 * sizes[0]
    expected, found = (
        hjepa_jax.load(tmp_path / dtype / "model.safetensors").embed(IMAGES) for dtype in DTYPES
    )
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("timm", {"model.positions": "sincos2d", "model.layer_scale": 0.1}),
        ("transformers", {}),
        ("transformers", {
            "model.num_summary_tokens": 0, "model.num_registers": 0, "loss.summary_weight": 0.0,
            "loss.regularizer": "none", "loss.regularizer_weight": 0.0,
        }),
    ],
)  # fmt: skip
def test_an_encoder_in_another_layout_comes_back_the_same(layout, fields, shapes_npz, tmp_path):
    make_run(tmp_path / "run", shapes_npz, **{"model.num_registers": 1, **fields})
    export(tmp_path / "run", tmp_path / "out", layout=layout)
    convert(tmp_path / "out", tmp_path / "back")
    here, back = hjepa_jax.load(tmp_path / "run"), hjepa_jax.load(tmp_path / "back")
    assert back.config.model.num_summary_tokens == here.config.model.num_summary_tokens
    jax.tree.map(np.testing.assert_array_equal, back.embed(IMAGES), here.embed(IMAGES))


@pytest.mark.parametrize(
    ("layout", "fields", "rule"),
    [
        ("timm", {"model.positions": "rope2d"}, "has no rotary positions"),
        ("timm", {"model.stem": "hmlp"}, "has only linear patch embeddings"),
        ("timm", {"model.layer_norm_epsilon": 1e-5}, "needs model.layer_norm_epsilon=1e-6"),
        ("transformers", {"model.mlp_ratio": 2.5}, "needs a whole model.mlp_ratio"),
    ],
)
def test_a_layout_refuses_models_that_it_cannot_store(layout, fields, rule, shapes_npz, tmp_path):
    make_run(tmp_path / "run", shapes_npz, **fields)
    with pytest.raises(InputError, match=f"^--format='{layout}': {rule}"):
        export(tmp_path / "run", tmp_path / "out", layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("layout", "rule"),
    [("tflite", "must be one of hjepa_jax, timm, transformers, stablehlo, onnx"),
     ("onnx", "needs the package jax2onnx")],
)  # fmt: skip
def test_a_layout_that_cannot_be_made_is_refused(layout, rule, workdir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)  # as if it was not installed
    with pytest.raises(InputError, match=f"^--format='{layout}': {rule}"):
        export(workdir, tmp_path / "out", layout=layout)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "rule"),
    [("net", "must be USER/NAME"), ("ada/net", "needs the package huggingface_hub")],
)
def test_an_impossible_upload_is_refused_before_any_work(name, rule, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it was not installed
    with pytest.raises(InputError, match=rf"^--push='{name}': {rule}"):
        check_push(name)


def test_a_program_needs_jax_alone_and_takes_any_batch(workdir, tmp_path):
    """Runs the program in a process that cannot import the package."""
    export(workdir, tmp_path / "out", layout="stablehlo")
    np.save(tmp_path / "images.npy", IMAGES)
    code = """
import sys
import numpy as np
from jax import export
program = export.deserialize(bytearray(open("out/model.stablehlo", "rb").read()))
images = np.load("images.npy")
for size in (1, 2, 5):
    np.savez(f"{size}.npz", **program.call(images[:size]))
assert not {"hjepa_jax", "flax", "orbax"} & {*sys.modules}
"""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=plain, check=True)
    encoder = hjepa_jax.load(workdir)
    expected = encoder.embed(IMAGES)
    expected["tokens"] = encoder.tokens(IMAGES).reshape(5, 16, 16)
    for size in (1, 2, 5):
        with np.load(tmp_path / f"{size}.npz") as found:
            assert {*found.files} == {*expected}
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value[:size], atol=1e-5)


def test_other_files_are_no_encoder(workdir, tmp_path):
    export(workdir, tmp_path / "timm", layout="timm")
    path = tmp_path / "timm" / "model.safetensors"
    with pytest.raises(InputError, match=r"^workdir=.*is no encoder of hjepa_jax; .*convert"):
        hjepa_jax.load(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"^workdir=.*bytes, and .* by its header"):
        hjepa_jax.load(path)
