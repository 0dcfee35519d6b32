"""Facts about a run are read from its work directory alone."""

import json
import shutil

import numpy as np
import pytest

from hjepa_jax.data.sources import open_source
from hjepa_jax.evaluation.collapse import measure_spread, verdict_beside
from hjepa_jax.reporting import look
from hjepa_jax.reporting.facts import read_facts


@pytest.fixture
def copied(tiny_run, tmp_path, monkeypatch):
    """A copied work directory; its data is missing, and nothing may be downloaded."""

    def open_local(*args, may_download, **options):
        assert not may_download
        return open_source(*args, may_download=False, **options)

    monkeypatch.setattr("hjepa_jax.runs.run.open_source", open_local)
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    edit(workdir, source="npz:/nowhere/shapes.npz")
    return workdir


def edit(workdir, *, source=None, num_steps=None, num_epochs=0.4):
    """Changes source and length of a run. The default length is 6 of 15 steps per epoch."""
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    config["data"]["source"] = source or config["data"]["source"]
    config["train"] |= {"num_steps": num_steps, "num_epochs": num_epochs}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("images", [False, True])
def test_a_copied_run_is_known_to_have_finished(copied, images):
    facts = read_facts(copied, images=images)
    assert (facts.status, facts.num_steps, facts.steps_per_epoch) == ("finished", 6, 15)
    assert ("nowhere" if images else "--noimages") in facts.no_look


def test_without_run_json_the_length_is_unknown(copied):
    (copied / "run.json").unlink()
    facts = read_facts(copied, images=True)
    assert (facts.status, facts.num_steps, facts.steps_per_epoch) == ("unknown", None, None)
    edit(copied, num_steps=6)
    assert read_facts(copied, images=False).status == "finished"


def test_run_json_of_another_run_is_ignored(copied):
    path = copied / "run.json"
    path.write_text(path.read_text().replace('"fingerprint": "all-', '"fingerprint": "all-0'))
    assert read_facts(copied, images=False).status == "unknown"


def test_other_images_than_in_training_give_no_pictures(tiny_run, tmp_path, shapes_npz):
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    with np.load(shapes_npz.removeprefix("npz:")) as arrays:
        changed = dict(arrays)
    changed["train_images"] = 255 - changed["train_images"]
    np.savez(tmp_path / "other.npz", **changed)
    edit(workdir, source=f"npz:{tmp_path}/other.npz")
    facts = read_facts(workdir, images=True)
    assert "holds other images than the run was trained on" in facts.no_look
    assert facts.status == "finished"


@pytest.mark.parametrize(
    ("best", "name"), [("level_1", "level 1, mean over patches"), ("summary", "summary tokens")]
)
def test_pictures_use_the_features_with_the_best_knn_score(best, name):
    labels = np.arange(200) % 4
    noise = np.random.default_rng(0).normal(size=(2, 200, 4))
    bank = {key: noise[0] for key in ("level_0", "level_1", "summary")}
    bank[best] = np.eye(4)[labels] + 0.01 * noise[1]
    queries = {key: x[:10] for key, x in bank.items()}
    found, of_bank, of_queries = look._best_features(bank, queries, labels)
    assert found == name
    np.testing.assert_array_equal(of_bank, bank[best])
    np.testing.assert_array_equal(of_queries, queries[best])


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        ([9.0, 1.4, 1.4], []),  # two lines are not enough
        ([9.0, 1.4, 1.4, 1.3], ["effective rank 1.3 is below 1.6"]),
        ([9.0, 1.4, 1.4, 1.3, 5.0], []),
        ([1.2, 1.2, 1.2], ["effective rank 1.2 is below 1.5"]),  # nearly constant from the start
        ([1.55, 1.5, 1.52, 1.5], []),  # no lower than untrained; 10 % of 16 is 1.6
    ],
)
def test_a_collapse_must_last_for_three_lines(tiny_run, tmp_path, ranks, found):
    """A batch has 16 images; the logged rank uses a window of up to 512 images."""
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    lines = [
        {"step": 40 * (i + 1), "train/effective_rank": rank, "train/relative_std": 0.6}
        for i, rank in enumerate(ranks)
    ]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    facts = read_facts(workdir, images=False)
    assert facts.signs_of_collapse() == found
    assert facts.limits.effective_rank == pytest.approx(1.6 if ranks[0] == 9.0 else 1.5)


def test_the_verdict_compares_features_with_the_untrained_network():
    rng = np.random.default_rng(0)
    narrow = rng.normal(size=(200, 2)) @ rng.normal(size=(2, 64))  # 2 directions of 64
    wide = rng.normal(size=(200, 64))
    point = 1 + 1e-4 * wide
    label = lambda x, untrained: verdict_beside(x, measure_spread(untrained)).label
    assert label(narrow, wide) == "partial collapse"
    assert label(narrow, narrow) == "healthy"
    assert label(point, point) == "collapse"
    assert label(wide, narrow) == "healthy"
    assert verdict_beside(narrow, None).label == "partial collapse"
