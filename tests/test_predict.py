"""The classifier that fine-tuning saves, used from Python."""

import shutil

import numpy as np
import pytest

import hjepa_jax
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.classifier_file import is_kept
from hjepa_jax.evaluation.judge import judge_run
from hjepa_jax.evaluation.protocol import Protocol
from hjepa_jax.exchange.export import export
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runs.workdir import load_config


@pytest.fixture(scope="module")
def fine_tuned(tiny_run, tmp_path_factory):
    """A fine-tuned run: its work directory, its row, its source and its test images."""
    workdir = tmp_path_factory.mktemp("predict") / "run"
    shutil.copytree(tiny_run, workdir)
    config = load_config(workdir)
    model, state, _ = load_state(workdir)
    source = open_config_source(config, quiet=True)
    train, test = source.load()
    protocol = Protocol(protocols=("finetune",), num_val=40, batch_size=60)
    (row,) = judge_run(
        workdir, config, model, {"target": state.target_params}, train, test,
        source=source, step=6, protocol=protocol, finetune_epochs=3.0,
    )  # fmt: skip
    return workdir, row, source, test


@pytest.mark.slow
def test_predictions_reach_the_score_of_the_fine_tuning(fine_tuned):
    workdir, row, source, test = fine_tuned
    names, probabilities = hjepa_jax.load(workdir).predict(test.images)
    truth = [source.info.class_names[label] for label in test.labels]
    assert np.mean([a == b for a, b in zip(names, truth, strict=True)]) == row["top1"]
    assert probabilities.shape == (len(test.images), len(source.info.class_names))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    one, _ = hjepa_jax.load(workdir).predict(test.images[0])
    assert one == names[:1]


@pytest.mark.slow
def test_a_classifier_belongs_to_one_fine_tuning(fine_tuned):
    workdir, row, source, _ = fine_tuned
    names = source.info.class_names
    assert is_kept(workdir, names, row["made_from"])
    assert not is_kept(workdir, names, "of other images")
    assert not is_kept(workdir, names[::-1], row["made_from"])
    assert not is_kept(workdir.parent, names, row["made_from"])


def test_a_run_without_a_classifier_says_how_to_get_one(tiny_run):
    with pytest.raises(InputError, match=r"^workdir=.*holds no classifier; .*--protocols=finetune"):
        hjepa_jax.load(tiny_run).predict(np.zeros((16, 16, 3), np.uint8))


def test_a_file_from_export_has_no_classifier(tiny_run, tmp_path):
    export(str(tiny_run), str(tmp_path / "encoder"))
    encoder = hjepa_jax.load(tmp_path / "encoder")
    with pytest.raises(InputError, match="without a classifier"):
        encoder.predict(np.zeros((16, 16, 3), np.uint8))


@pytest.mark.slow
def test_a_damaged_classifier_is_refused(fine_tuned, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(fine_tuned[0], workdir)
    path = workdir / "classifier.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"has a damaged classifier\.npz"):
        hjepa_jax.load(workdir).predict(np.zeros((16, 16, 3), np.uint8))
