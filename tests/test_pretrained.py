"""The trained encoder that ships with the package: by name, with the scores of its run."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import hjepa_jax
from hjepa_jax.evaluation.knn import knn_probe
from hjepa_jax.evaluation.results import format_best
from hjepa_jax.runs.scores import read_probe_json
from tests.conftest import REPOSITORY
from tests.test_cli import assert_refused
from tests.test_embed import make_run
from tests.test_sources import open_here

NAME = "cifar10_tiny"
RUN = REPOSITORY / "experiments" / NAME / "report"
EMBED = "hjepa_jax.embed"


@pytest.fixture
def photos(tmp_path):
    """Two photos of different sizes."""
    rng, paths = np.random.default_rng(0), [tmp_path / "a.png", tmp_path / "b.png"]
    for path, shape in zip(paths, ((40, 60, 3), (32, 32, 3)), strict=True):
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def test_its_facts_are_those_of_the_recorded_run():
    encoder = hjepa_jax.load(NAME)
    rows = read_probe_json(RUN / "probe.json")
    best = {protocol: format_best(rows, protocol) for protocol in ("linear", "knn")}
    assert encoder.info["scores"] == best
    assert {encoder.info["step"]} == {row["step"] for row in rows if row["encoder"] == "target"}
    recorded = json.loads((RUN / "config.json").read_text())
    assert json.loads(encoder.config.to_json())["model"] == recorded["model"]


def test_the_command_and_python_give_the_same_features(run_module, photos, tmp_path):
    output = tmp_path / "features.npz"
    done = run_module(EMBED, f"--model={NAME}", f"--output={output}", *photos)
    assert done.returncode == 0, done.stderr
    expected = hjepa_jax.load(NAME).embed(photos)
    with np.load(output) as found:
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4)


def test_a_path_of_the_user_goes_before_a_name(shapes_npz, tmp_path, monkeypatch):
    make_run(tmp_path / NAME, shapes_npz)
    monkeypatch.chdir(tmp_path)
    assert hjepa_jax.load(NAME).config.model.width == 16


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=cifar10"], f"--model='cifar10': must be one of {NAME}"),
        ([], f"--workdir=None: must be given, or --model with one of {NAME}"),
        ([f"--model={NAME}", "--workdir=x"], f"--model='{NAME}': must be left out if --workdir"),
    ],
    ids=("unknown", "neither", "both"),
)
def test_exactly_one_known_encoder_must_be_named(run_module, photos, tmp_path, flags, words):
    output = tmp_path / "features.npz"
    assert_refused(run_module(EMBED, *flags, f"--output={output}", *photos), words)
    assert not output.exists()


@pytest.mark.slow
def test_it_knows_the_classes_of_cifar10():
    """With all 50,000 labelled images, it has 59.2 percent, and a random-init encoder 34.9."""
    if "TFDS_DATA_DIR" not in os.environ:
        pytest.skip("set TFDS_DATA_DIR to a folder with the prepared CIFAR-10")
    train, test = open_here("tfds:cifar10", data_dir=os.environ["TFDS_DATA_DIR"]).load()
    encoder, (known, asked) = hjepa_jax.load(NAME), (slice(5000), slice(1000))
    bank = encoder.embed(train.images[known])["summary"]
    queries = encoder.embed(test.images[asked])["summary"]
    found = knn_probe(bank, train.labels[known], queries, test.labels[asked], num_classes=10)
    assert found.top1 > 0.45
