"""The training loop: the files of a run, and exact resume."""

import collections
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest
from PIL import Image

from hjepa_jax import cli
from hjepa_jax.config import build
from hjepa_jax.data.base import Split
from hjepa_jax.data.npz import save_npz
from hjepa_jax.data.order import BatchOrder
from hjepa_jax.errors import InputError, Interrupted
from hjepa_jax.evaluation import collapse, extraction, protocols, quality
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.method.window import make_run_steps
from hjepa_jax.reporting import showcase
from hjepa_jax.reporting.publish import write_report
from hjepa_jax.runs import checkpoint, run
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.runs.load import load_encoder
from hjepa_jax.runs.lock import locked
from hjepa_jax.runs.progress import Progress
from hjepa_jax.runs.record import read_record
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.training import loop, train
from hjepa_jax.training.alarms import Alarms
from hjepa_jax.training.loop import MAX_CALLS_UNDER_WAY, Loop
from tests import processes

TRAIN_METRICS = {
    "train/loss",
    "train/loss_level_0",
    "train/loss_level_1",
    "train/loss_summary",
    "train/loss_variance",
    "train/loss_covariance",
    "train/learning_rate",
    "train/weight_decay",
    "train/ema_momentum",
    "train/grad_norm",
    "train/update_norm",
    "train/param_norm",
    "train/context_std",
    "train/target_std",
    "train/effective_rank",
    "train/relative_std",
    "train/nonfinite_steps",
    "train/pred_target_cosine",
    "train/explained_variance_level_0",
    "train/explained_variance_level_1",
    "train/explained_variance_summary",
    "train/position_share",
    "train/image_share",
    "train/num_targets_level_0",
    "train/num_targets_level_1",
    "perf/images_per_sec",
    "perf/steps_per_sec",
    "perf/data_wait_fraction",
    "perf/peak_memory_bytes",
}


def final_state(config, workdir: pathlib.Path):
    built = train.build_run(config, run.open_config_source(config))
    checkpoints = checkpoint.Checkpoints(workdir, config=config)
    state, window = checkpoints.restore(*built.create())
    checkpoints.close()
    return jax.device_get(state), jax.device_get(window)


def assert_same_tree(a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def without_timings(lines):
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def stop_at(monkeypatch: pytest.MonkeyPatch, at_step: int, signum: int = signal.SIGTERM):
    """Sends this process a real signal once the log shows `at_step`."""
    show = Progress.show

    def show_and_signal(self, step, **kwargs):
        show(self, step, **kwargs)
        if step == at_step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Progress, "show", show_and_signal)


def test_a_run_logs_every_metric_at_increasing_steps(tiny_config, tmp_path):
    train.train_and_evaluate(tiny_config, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert set(line) - {"step", "eval/knn_top1", "eval/knn_top1_summary"} == TRAIN_METRICS
        assert all(np.isfinite(value) for value in line.values())
    assert 0 <= lines[-1]["eval/knn_top1"] <= 1
    assert lines[-1]["perf/peak_memory_bytes"] > 1e6
    np.testing.assert_allclose(lines[0]["train/learning_rate"], 1e-3 * 2 / 15, rtol=1e-5)


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(tiny_config, tmp_path, monkeypatch):
    """One case; tests/faults/test_resume.py has many settings."""
    stop_step, remembered = 2, []
    tiny_config.log.every_steps = 1
    monkeypatch.setattr(
        Alarms, "remember", lambda _, lines: remembered.append([line["step"] for line in lines])
    )
    train.train_and_evaluate(tiny_config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, stop_step)
        with pytest.raises(Interrupted):
            train.train_and_evaluate(tiny_config, tmp_path / "parts")
    # The signal comes while step `stop_step` is being logged: the next step saves and stops.
    assert read_metrics(tmp_path / "parts/metrics.jsonl")[-1]["step"] == stop_step + 1
    assert (tmp_path / "parts/checkpoints" / str(stop_step + 1)).is_dir()
    train.train_and_evaluate(tiny_config, tmp_path / "parts")
    assert_same_tree(
        final_state(tiny_config, tmp_path / "whole"), final_state(tiny_config, tmp_path / "parts")
    )
    whole, parts = (
        without_timings(read_metrics(tmp_path / name / "metrics.jsonl"))
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert remembered == [[], [], [1, 2, 3]], "the alarms read the log up to the checkpoint"


def test_few_calls_are_queued_at_a_time(tiny_config, tmp_path, monkeypatch):
    """So a stopped run ends after a few steps, not after all steps up to the next log line."""
    tiny_config.train.num_steps = tiny_config.train.checkpoint_every_steps = 40
    tiny_config.log.every_steps = 40
    tiny_config.eval.every_epochs = 0.0
    marks, under_way, take = [], [], Loop._take

    class Marks(collections.deque):  # observes the loop's own marks
        def append(self, mark):
            marks.append(mark)
            super().append(mark)

    def count_and_take(*args):
        under_way.append(sum(not mark.is_ready() for mark in marks))
        return take(*args)

    monkeypatch.setattr(loop, "collections", types.SimpleNamespace(deque=Marks))
    monkeypatch.setattr(Loop, "_take", count_and_take)
    train.train_and_evaluate(tiny_config, tmp_path)
    assert len(under_way) == 40
    assert len(marks) == 40
    assert max(under_way) < MAX_CALLS_UNDER_WAY


@pytest.mark.parametrize(
    "moment",
    [pytest.param("in the last step", marks=pytest.mark.slow), "while the last step is saved"],
)
@pytest.mark.usefixtures("short_probes")
def test_a_run_stopped_at_its_last_step_probes_only_after_resume(
    tiny_config, tmp_path, monkeypatch, capsys, moment
):
    tiny_config.eval.probe_at_end, tiny_config.eval.every_epochs = True, 0.0
    with monkeypatch.context() as patch:
        if moment == "in the last step":
            patch.setattr(BatchOrder, "batches", BatchOrder.batches)  # undone at the end
            processes.stop_in_step(6)
        else:
            stop_at(patch, 6)
        with pytest.raises(Interrupted, match="SIGTERM at step 6"):
            train.train_and_evaluate(tiny_config, tmp_path)
    assert (tmp_path / "checkpoints/6").is_dir()
    assert not (tmp_path / "probe.json").exists()
    train.train_and_evaluate(tiny_config, tmp_path)
    assert "already trained: step 6 of 6" in capsys.readouterr().out
    assert (tmp_path / "probe.json").exists()


def save_for_ever(config, workdir: pathlib.Path) -> None:
    """Runs a command that gets a Ctrl-C in step 2, and a second one in a save that hangs."""

    def hang(*_):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()

    checkpoint.ocp.CheckpointManager._finalize = hang
    processes.stop_in_step(2, signal.SIGINT)
    sys.argv = ["main"]
    cli.run(lambda: train.train_and_evaluate(config, workdir))


def test_a_second_ctrl_c_ends_the_command_while_it_saves(tiny_config, tmp_path):
    process = processes.CONTEXT.Process(target=save_for_ever, args=(tiny_config, tmp_path))
    process.start()
    process.join(processes.COMMAND_SEC)  # it ends at once; a slow machine starts it late
    process.kill()
    process.join()
    assert process.exitcode == 128 + signal.SIGINT
    assert not (tmp_path / "checkpoints/2").exists()


@pytest.mark.slow
def test_steps_per_call_changes_no_result(tiny_config, tmp_path):
    train.train_and_evaluate(tiny_config, tmp_path / "one")
    tiny_config.train.steps_per_call = 4
    train.train_and_evaluate(tiny_config, tmp_path / "four")
    one, four = (
        read_metrics(tmp_path / name / "metrics.jsonl")[-1]["train/loss"]
        for name in ("one", "four")
    )
    np.testing.assert_allclose(one, four, rtol=1e-4)


@pytest.mark.usefixtures("own_programs")
def test_the_step_is_compiled_once(tiny_config, tmp_path, monkeypatch):
    """Epoch ends, logs and odd remainders must not change the shapes of the program.

    Nor does a run that goes on at another resolution compile that of the first one again.
    """
    compiled = []
    make = make_run_steps

    def counting(train_step):
        def run_steps(*args):
            compiled.append(1)
            return make(train_step)(*args)

        return run_steps

    monkeypatch.setattr(run, "make_run_steps", counting)
    tiny_config.train.num_steps = 17
    tiny_config.train.steps_per_call = 4
    tiny_config.eval.every_epochs = 0.0
    train.train_and_evaluate(tiny_config, tmp_path / "first")
    assert len(compiled) == 1
    tiny_config.train.steps_per_call = 1
    tiny_config.train.init_from, tiny_config.data.image_size = str(tmp_path / "first"), 24
    tiny_config.mask.scale = (0.1, 0.25)
    train.train_and_evaluate(tiny_config, tmp_path / "larger")
    assert len(compiled) == 2


def test_tensorboard_explains_every_curve():
    names = [(key.partition("/")[0], name) for key in showcase.CURVES
             for name in key.partition("/")[2].split(", ")]  # fmt: skip
    patterns = [f"{group}/{re.sub('<.*>', '.+', name)}" for group, name in names]
    for metric in TRAIN_METRICS | {"eval/knn_top1_summary", "eval/linear_top1_level_1"}:
        assert any(re.fullmatch(pattern, metric) for pattern in patterns), metric


def test_the_first_step_is_shown_at_once(tiny_config, tmp_path, capsys):
    tiny_config.log.every_steps = 6
    train.train_and_evaluate(tiny_config, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"opening {tiny_config.data.source} for {tmp_path} ..."
    assert lines[1].split() == ["workdir", str(tmp_path)]
    (first,) = (i for i, line in enumerate(lines) if "  step 1/6  loss " in line)
    assert lines[first - 2] == "compiling the training step ..."
    (last,) = (line for line in lines if "  step 6/6  loss " in line)
    assert "  rank " in last


@pytest.mark.usefixtures("own_programs")
def test_rates_and_length_do_not_change_the_program(tiny_config):
    """So the cache of compiled programs has it: only its arguments differ."""

    def program() -> str:
        built = run.build_run(tiny_config, run.open_config_source(tiny_config))
        return built.lower(steps_per_call=1, donate=False).as_text()

    before = program()
    c = tiny_config.optim
    c.learning_rate, c.final_learning_rate, c.warmup_epochs, c.decay_epochs = 0.5, 0.1, 0.3, 0.2
    c.weight_decay, c.final_weight_decay, c.ema_momentum = 0.3, 0.4, (0.9, 0.9, "constant")
    tiny_config.train.num_steps = 9
    assert program() == before


@pytest.mark.parametrize("harm", ["damaged newest", "edited config.json"])
def test_checkpoints_resume_only_under_their_own_config(
    tiny_config, tiny_run, tmp_path, capsys, harm
):
    """A refused command changes nothing, and the right one still resumes."""
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    if harm == "edited config.json":
        path = workdir / "config.json"
        path.write_text(path.read_text().replace('"smooth_l1"', '"mse"'))
    else:
        (workdir / "config.json").unlink()
    if harm == "damaged newest":
        (workdir / "checkpoints/6/meta/metadata").write_text("{")
    before = contents(workdir)
    other = tiny_config.copy_and_resolve_references()
    other.loss.kind, other.optim.b2 = "mse", 0.9
    rule = r"another config \(loss.kind 'smooth_l1' -> 'mse', optim.b2 0.95 -> 0.9\)"
    with pytest.raises(InputError, match=rule):
        train.train_and_evaluate(other, workdir)
    assert contents(workdir) == before
    if harm == "damaged newest":
        return
    train.train_and_evaluate(tiny_config, workdir)
    assert "already trained: step 6 of 6" in capsys.readouterr().out
    assert load_config(workdir).to_dict() == tiny_config.to_dict()
    assert_same_tree(final_state(tiny_config, workdir), final_state(tiny_config, tiny_run))


def contents(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    found = (path for path in folder.rglob("*") if path.name != "lock")
    return {path: path.stat().st_mtime_ns for path in found if path != folder}


def test_a_start_that_fails_late_leaves_no_files(tiny_config, tiny_run, tmp_path, monkeypatch):
    """Cases: all checkpoints are damaged; the step does not compile."""
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    (workdir / "config.json").unlink()
    for folder in (workdir / "checkpoints").iterdir():
        shutil.rmtree(folder / "state")
    before = contents(workdir)
    with pytest.raises(InputError, match="holds no checkpoint that can be read"):
        train.train_and_evaluate(tiny_config, workdir)
    assert contents(workdir) == before

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "return_unused_memory", fail)  # the loop's last call before the start
    for target in (tmp_path / "new" / "run", workdir):
        with pytest.raises((RuntimeError, InputError)):
            train.train_and_evaluate(tiny_config, target)
    assert not (tmp_path / "new").exists()
    assert contents(workdir) == before


def test_a_run_resumes_with_moved_data_but_not_with_other_images(
    tiny_config, tiny_run, tmp_path, shapes_npz, capsys
):
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(shapes_npz.removeprefix("npz:"), tmp_path / "moved.npz")
    tiny_config.data.source = f"npz:{tmp_path}/moved.npz"
    train.train_and_evaluate(tiny_config, workdir)
    out = capsys.readouterr()
    assert "goes on with data.source " in out.out
    assert "warning" not in out.err
    assert load_config(workdir).data.source == tiny_config.data.source
    record = read_record(workdir)
    assert record is not None
    assert (record.num_images, record.num_steps, record.steps_per_epoch) == (240, 6, 15)
    assert record.data["source"] == tiny_config.data.source
    assert (record.data["num_train"], record.data["num_test"]) == (240, 60)
    assert record.class_names == tuple(map(str, range(10)))
    assert record.preprocessing["mean"] == list(tiny_config.data.mean)

    with np.load(tmp_path / "moved.npz") as arrays:
        train_split = Split(*(np.concatenate([a, a[:9]]) for a in
                              (arrays["train_images"], arrays["train_labels"])))  # fmt: skip
        save_npz(tmp_path / "moved.npz", train_split,
                 Split(arrays["test_images"], arrays["test_labels"]))  # fmt: skip
    with pytest.raises(InputError, match=r"was trained on 240 images, and data.source has 249 now"):
        train.train_and_evaluate(tiny_config, workdir)
    other = Split(255 - train_split.images[:240], train_split.labels[:240])
    save_npz(tmp_path / "moved.npz", other, other)
    with pytest.raises(InputError, match=r"not known to be the same \(fingerprint"):
        train.train_and_evaluate(tiny_config, workdir)


def test_a_run_with_a_constant_rate_may_become_longer(tiny_config, tmp_path):
    """It equals a run of that length bit for bit; past updates must not change."""
    c = tiny_config
    c.optim.warmup_epochs, c.optim.decay_epochs, c.train.num_steps = 0.0, 0.0, 2
    train.train_and_evaluate(c, tmp_path / "parts")
    c.optim.decay_epochs, c.train.num_steps = 0.2, 6  # an epoch has 15 steps
    for name in ("parts", "whole"):
        train.train_and_evaluate(c, tmp_path / name)
        assert load_config(tmp_path / name).to_dict() == c.to_dict()
    assert_same_tree(*(final_state(c, tmp_path / name) for name in ("parts", "whole")))

    refused = {
        ("train.num_steps", 8): "(train.num_steps 6 -> 8), and made update 5 at learning_rate "
        "0.00025, not 0.001; ",
        ("train.num_steps", 4): ", which made 6 updates where this one would end after 4; ",
        ("optim.weight_decay", 0.1): ", and made update 1 at weight_decay 0.05, not 0.1; ",
    }
    for (field, value), words in refused.items():
        other = c.copy_and_resolve_references()
        other.update_from_flattened_dict({field: value})
        with pytest.raises(InputError, match=re.escape(words)):
            train.train_and_evaluate(other, tmp_path / "parts")
        assert load_config(tmp_path / "parts").to_dict() == c.to_dict()


def test_a_workdir_is_locked_until_its_process_is_gone(tmp_path):
    code = "import sys, pathlib\nfrom hjepa_jax.runs.lock import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == "held\n"
        owner = f"in use by process {first.pid} on .*, since "
        with pytest.raises(InputError, match=owner), locked(tmp_path):
            pass
        first.kill()  # without clean-up: the lock must be released all the same
        first.wait()
    with (
        locked(tmp_path),
        pytest.raises(InputError, match="in use"),
        locked(tmp_path),
    ):
        pass


def test_a_run_writes_no_config_before_it_holds_the_lock(tiny_config, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with locked(workdir), pytest.raises(InputError, match="in use"):
        train.train_and_evaluate(tiny_config, workdir)
    assert not (workdir / "config.json").exists()


def test_knn_during_training_uses_level_0_and_the_summary_tokens(tiny_config, tmp_path):
    train.train_and_evaluate(tiny_config, tmp_path)
    line = read_metrics(tmp_path / "metrics.jsonl")[-1]
    model, params = load_encoder(tmp_path)
    train_split, _ = run.open_config_source(tiny_config).load()
    features = jax.jit(build.build_embed_fn(tiny_config, model))(params, train_split.images)
    bank, queries = hold_out(len(train_split.labels), num_val=tiny_config.eval.num_val)
    bank = bank[np.linspace(0, len(bank) - 1, tiny_config.eval.knn_bank_size).astype(int)]
    found = {}
    for name, x in features.items():
        unit = np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)
        similar = unit[queries] @ unit[bank].T
        nearest = np.argsort(-similar, axis=1, kind="stable")[:, :20]
        votes = np.zeros((len(queries), 12))
        for row, columns in enumerate(nearest):
            for column in columns:
                label = train_split.labels[bank[column]]
                votes[row, label] += np.exp(similar[row, column] / 0.07)
        found[name] = np.mean(votes.argmax(axis=1) == train_split.labels[queries])
    assert found["level_0"] != found["summary"], "of one another they could not be told"
    assert line["eval/knn_top1"] == pytest.approx(found["level_0"])
    assert line["eval/knn_top1_summary"] == pytest.approx(found["summary"])


def test_too_many_nonfinite_steps_end_the_run(tiny_config, tmp_path):
    tiny_config.data.std = (1e-38,) * 3  # pixels that overflow
    tiny_config.train.max_nonfinite_steps = 2
    rule = r"max_nonfinite_steps=2: .* 3 of 3 steps.* is step 3: .*loss_level_0.*No checkpoint yet"
    with pytest.raises(InputError, match=rule):
        train.train_and_evaluate(tiny_config, tmp_path)
    line, end = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["step"], line["train/nonfinite_steps"]) == (2, 2)
    assert "train/loss" not in line  # JSON has no NaN
    assert end == {"step": 3, "train/nonfinite_steps": 3}


@pytest.mark.usefixtures("blank_pictures")
def test_a_collapse_prints_a_warning_or_ends_the_run(tiny_config, tmp_path, monkeypatch, capsys):
    """The thresholds are so high that every run has collapsed."""
    monkeypatch.setattr(quality, "MIN_RANK_FRACTION", 2.0)
    monkeypatch.setattr(collapse, "UNTRAINED_SHARE", 100.0)
    tiny_config.log.every_steps = 1
    train.train_and_evaluate(tiny_config, tmp_path / "warns")
    assert capsys.readouterr().out.count("WARNING: target features at step 3: partial coll") == 1
    tiny_config.train.on_collapse, tiny_config.log.report = "stop", True
    with pytest.raises(InputError, match=r"on_collapse='stop': .*partial collapse"):
        train.train_and_evaluate(tiny_config, tmp_path / "stops")
    report = (tmp_path / "stops" / "report.md").read_text()
    assert "**Status: stopped**, step 3 of 6." in report
    assert "the run ended: train.on_collapse=stop: effective rank" in report
    assert "Run the same command again" not in report


@pytest.mark.usefixtures("short_probes")
def test_the_final_probe_has_trained_random_and_pixel_rows(
    tiny_config, tmp_path, monkeypatch, capsys
):
    tiny_config.eval.probe_at_end = True
    rows = train.train_and_evaluate(tiny_config, tmp_path)
    assert rows == json.loads((tmp_path / "probe.json").read_text())["results"]
    assert {row["encoder"] for row in rows} == {"target", "random_init", "pixels"}
    assert {row["protocol"] for row in rows} == {"linear", "knn"}
    for row in rows:
        assert 0 <= row["top1"] <= 1
        assert row["train_size"] == 240
        assert row["test_size"] == 60
        assert row["step"] == (6 if row["encoder"] == "target" else 0)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    by_level = {
        row["level"]: row["top1"]
        for row in rows
        if (row["encoder"], row["pool"], row["protocol"]) == ("target", "mean", "linear")
    }
    assert last["eval/linear_top1"] == by_level["all"]
    assert last["eval/linear_top1_level_1"] == by_level[1]

    # A finished command makes nothing again.
    before = contents(tmp_path)
    capsys.readouterr()
    for name in ("linear_probe", "knn_probe"):
        monkeypatch.setattr(protocols, name, None)
    monkeypatch.setattr(extraction, "extract_features", None)
    assert train.train_and_evaluate(tiny_config, tmp_path) == rows
    assert contents(tmp_path) == before
    assert f"{len(rows)} of {len(rows)} scores are unchanged" in capsys.readouterr().out


@pytest.mark.slow
def test_tensorboard_gets_scalars_hparams_texts_and_pictures(tiny_config, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(showcase, "MAX_SHARE", math.inf)  # of the seconds that this run takes
    tiny_config.log.tensorboard = True
    tiny_config.log.figures_every_epochs = 0.2  # 15 steps an epoch: every third step
    train.train_and_evaluate(tiny_config, tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert tags >= TRAIN_METRICS
    pictures = {"masks", "pca", "cosine", "similarity", "attention"}
    for name in pictures:
        assert [e.step for e in events.Tensors(f"figures/{name}")] == [1, 3, 6]
    assert [e.step for e in events.Tensors("figures/spectrum")] == [1, 3, 6]
    assert [e.step for e in events.Tensors("features/target")] == [1, 3, 6]
    assert tags >= {"config", "parameters", "environment", "curves"}
    (text,) = events.Tensors("parameters")
    assert b"patch_embedding" in text.tensor_proto.string_val[0]
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.slow
def test_a_run_skips_unreadable_images(tiny_config, tmp_path, capsys):
    """Shapes are static, so the run is built again for the remaining images."""
    for i in range(24):
        path = tmp_path / "photos" / "x" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(path)
    path.write_bytes(path.read_bytes()[:50])
    tiny_config.data.source = f"folder:{tmp_path / 'photos'}"
    tiny_config.train.num_steps = 1
    tiny_config.eval.every_epochs = 0
    train.train_and_evaluate(tiny_config, tmp_path / "run")
    assert f"1 of 24 files skipped: {path} cannot be decoded" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


@pytest.mark.slow  # it loads TensorFlow
def test_pictures_do_not_change_the_metrics(tiny_config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_config.unlock()
    tiny_config.train.num_steps = 2
    tiny_config.eval.every_epochs = 0.0
    lines = []
    for every in (0.0, 0.1):
        tiny_config.log.tensorboard = bool(every)
        tiny_config.log.figures_every_epochs = every
        workdir = tmp_path / str(every)
        train.train_and_evaluate(tiny_config, workdir)
        lines.append(
            [
                {name: value for name, value in line.items() if not name.startswith("perf/")}
                for line in read_metrics(workdir / "metrics.jsonl")
            ]
        )
    assert lines[0] == lines[1]
    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0})
    events.Reload()
    assert [e.step for e in events.Tensors("figures/masks")] == [2]


def test_pictures_take_at_most_their_share_of_the_time():
    budget = showcase.Budget(0.02, first_cost=10.0)
    assert not budget.allows(499.0)
    assert budget.allows(500.0)
    budget.spend(7.0)  # the first; another would make it 14
    assert not budget.allows(699.0)
    assert budget.allows(701.0)
    budget.spend(2.0)  # nothing to compile: 9 so far, 11 with another
    assert not budget.allows(549.0)
    assert budget.allows(551.0)


@pytest.mark.slow
def test_a_report_that_cannot_be_written_does_not_fail_the_run(tiny_config, tmp_path, capsys):
    tiny_config.log.report = True
    tiny_config.train.num_steps = 1
    tiny_config.eval.every_epochs = 0
    (tmp_path / "figures").write_text("in the way")
    train.train_and_evaluate(tiny_config, tmp_path)
    errors = capsys.readouterr().err
    assert "no report could be written" in errors
    assert f"python -m hjepa_jax.report --workdir={tmp_path}" in errors
    (tmp_path / "figures").unlink()
    write_report([tmp_path], tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "**Status: finished**, step 1 of 1." in report, "one step is enough for a report"
    assert "| ? | The loss ended below its first value | fewer than two values |" in report
    assert "nan" not in report.lower()


def test_a_run_that_ends_before_a_save_logs_its_nonfinite_steps(tiny_config, tmp_path):
    tiny_config.data.std = (1e-38,) * 3
    tiny_config.train.max_nonfinite_steps = 0
    tiny_config.train.checkpoint_every_steps, tiny_config.log.every_steps = 1, 4
    with pytest.raises(InputError, match="max_nonfinite_steps"):
        train.train_and_evaluate(tiny_config, tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "train/nonfinite_steps": 1}]


def test_labels_unusable_for_probes_are_refused_before_training(tiny_config, tmp_path):
    """Cases: class 0 is missing, as if labels count from 1; there are too few images."""
    tiny_config.eval.probe_at_end = True
    images = np.zeros((40, 16, 16, 3), np.uint8)
    save_npz(tmp_path / "gap.npz", *[Split(images, np.arange(40, dtype=np.int32) % 3 + 1)] * 2)
    save_npz(tmp_path / "few.npz", *[Split(images[:4], np.arange(4, dtype=np.int32))] * 2)
    for name, batch_size, rule in (
        ("gap", 16, "has no training image of class 0 (1 of 4 lack)"),
        ("few", 2, "must have at least 5"),
    ):
        tiny_config.data.source = f"npz:{tmp_path}/{name}.npz"
        tiny_config.train.batch_size = batch_size
        with pytest.raises(InputError, match=re.escape(rule)) as refusal:
            train.train_and_evaluate(tiny_config, tmp_path / "run")
        assert refusal.value.field == "data.source"
        assert not (tmp_path / "run").exists()


def test_an_invalid_probe_json_is_refused_before_training(tiny_config, tmp_path):
    tiny_config.eval.probe_at_end = True
    (tmp_path / "probe.json").write_text("{}")
    with pytest.raises(InputError, match=r"probe\.json=.*must hold results"):
        train.train_and_evaluate(tiny_config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_workdir_of_another_config_is_refused_before_data_is_read(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(tiny_config.to_dict()))
    tiny_config.data.source = "folder:absent"
    with pytest.raises(InputError, match=r"holds a run of another config \(data.source"):
        train.train_and_evaluate(tiny_config, tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"must be a directory that can be written \(Not a dir"):
        train.train_and_evaluate(tiny_config, tmp_path / "file" / "run")
