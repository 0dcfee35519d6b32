"""What is known of a run from its workdir alone."""

import json
import shutil

import numpy as np
import pytest

from hjepa_jax import run_facts
from hjepa_jax.data.sources import open_source
from hjepa_jax.evaluation.results import write_probe_json
from hjepa_jax.run_facts import read_facts


@pytest.fixture
def copied(tiny_run, tmp_path, monkeypatch):
    """A workdir on another machine: its data is not there, and nothing may be downloaded."""

    def open_local(*args, may_download, **options):
        assert not may_download
        return open_source(*args, may_download=False, **options)

    monkeypatch.setattr("hjepa_jax.run.open_source", open_local)
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    edit(workdir, source="npz:/nowhere/shapes.npz")
    return workdir


def edit(workdir, *, source=None, num_steps=None, num_epochs=0.4, max_labelled=240):
    """Leaves the length to num_epochs: 6 of 15 steps an epoch, if there are 240 images."""
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    config["data"] |= {"max_labelled": max_labelled, "source": source or config["data"]["source"]}
    config["train"] |= {"num_steps": num_steps, "num_epochs": num_epochs}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("images", [False, True])
def test_a_copied_run_is_known_to_have_finished(copied, images):
    facts = read_facts(copied, images=images)
    assert (facts.status, facts.num_steps, facts.steps_per_epoch) == ("finished", 6, 15)
    assert ("nowhere" if images else "--noimages") in facts.no_look


def test_a_workdir_without_run_json_is_described_by_what_is_left(copied):
    (copied / "run.json").unlink()
    assert read_facts(copied, images=True).status == "unknown"
    assert read_facts(copied, images=False).num_steps is None
    rows = [
        {"protocol": "linear", "encoder": "target", "step": 6, "pool": "mean", "level": 0,
         "dim": 8, "data": "npz:/nowhere/shapes.npz", "top1": 0.5, "chosen": {"val_top1": 0.5},
         "train_size": 240},
    ]  # fmt: skip
    write_probe_json(copied / "probe.json", rows)
    assert read_facts(copied, images=False).status == "unknown", "maybe streamed"
    edit(copied, max_labelled=20_000)
    facts = read_facts(copied, images=False)
    assert (facts.status, facts.num_steps) == ("finished", 6)
    edit(copied, num_epochs=1.0, max_labelled=20_000)
    assert read_facts(copied, images=False).status == "interrupted"


def test_scores_that_a_run_logs_at_its_end_say_that_it_has_ended(copied):
    (copied / "run.json").unlink()
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    lines[-1] = lines[-1][:-1] + ', "eval/linear_top1": 0.5}'
    (copied / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    facts = read_facts(copied, images=False)
    assert (facts.status, facts.num_steps) == ("finished", 6)


def test_a_run_json_of_another_run_is_not_believed(copied):
    path = copied / "run.json"
    path.write_text(path.read_text().replace('"fingerprint": "all-', '"fingerprint": "all-0'))
    assert read_facts(copied, images=False).status == "unknown"


def test_pictures_are_of_the_images_that_were_trained_on(tiny_run, tmp_path, shapes_npz):
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    with np.load(shapes_npz.removeprefix("npz:")) as arrays:
        changed = dict(arrays)
    changed["train_images"] = 255 - changed["train_images"]
    np.savez(tmp_path / "other.npz", **changed)
    edit(workdir, source=f"npz:{tmp_path}/other.npz")
    facts = read_facts(workdir, images=True)
    assert "holds other images than the run was trained on" in facts.no_look
    assert facts.status == "finished"


def test_pictures_are_made_of_the_features_with_the_best_neighbours():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    noise, told = rng.normal(size=(2, 200, 4)), np.eye(4)[labels]
    for best, name in (
        ("level_1", "level 1, mean over patches"),
        ("summary", "summary tokens"),
    ):
        bank = {key: noise[0] for key in ("level_0", "level_1", "summary")}
        bank[best] = told + 0.01 * noise[1]
        queries = {key: x[:10] for key, x in bank.items()}
        found, of_bank, of_queries = run_facts._best_features(bank, queries, labels)
        assert found == name
        np.testing.assert_array_equal(of_bank, bank[best])
        np.testing.assert_array_equal(of_queries, queries[best])


def facts_with(tiny_run, tmp_path, ranks, stds=None):
    """Facts of a run with these values in its log; a batch has 16 images, a window 512."""
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    stds = stds or [0.6] * len(ranks)
    lines = [
        {"step": 40 * (i + 1), "train/effective_rank": rank, "train/relative_std": std}
        for i, (rank, std) in enumerate(zip(ranks, stds, strict=True))
    ]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return read_facts(workdir, images=False)


def test_a_rank_as_low_as_before_training_is_no_collapse(tiny_run, tmp_path):
    facts = facts_with(tiny_run, tmp_path, [1.55, 1.5, 1.52, 1.5])  # 10 % of 16 is 1.6
    assert facts.limits.effective_rank == pytest.approx(1.5)
    assert facts.signs_of_collapse() == []


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        ([9.0, 1.4, 1.4], []),  # two lines are not enough
        ([9.0, 1.4, 1.4, 1.3], ["effective rank 1.3 is below 1.6"]),
        ([9.0, 1.4, 1.4, 1.3, 5.0], []),
        ([1.2, 1.2, 1.2], ["effective rank 1.2 is below 1.5"]),  # nearly constant from the start
    ],
)
def test_a_collapse_has_lasted(tiny_run, tmp_path, ranks, found):
    facts = facts_with(tiny_run, tmp_path, ranks)
    assert facts.signs_of_collapse() == found


def test_the_verdict_on_a_checkpoint_is_beside_the_untrained_network():
    rng = np.random.default_rng(0)
    narrow = rng.normal(size=(200, 2)) @ rng.normal(size=(2, 64))  # 2 directions of 64
    wide = rng.normal(size=(200, 64))
    assert run_facts._verdict(narrow, wide).label == "partial collapse"
    assert run_facts._verdict(narrow, narrow).label == "healthy"
    point = 1 + 1e-4 * wide
    assert run_facts._verdict(point, point).label == "collapse"
    assert run_facts._verdict(wide, narrow).label == "healthy"
