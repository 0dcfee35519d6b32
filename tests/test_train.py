"""The training loop: the files of a run, and exact resume."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
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
from hjepa_jax.runs.record import read_record
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.training import loop, program, train
from hjepa_jax.training.alarms import Alarms
from hjepa_jax.training.loop import MAX_CALLS_UNDER_WAY, Loop
from tests import processes
from tests.processes import lines_of, state_and_lines

METRICS = """
train/loss train/loss_level_0 train/loss_level_1 train/loss_summary train/loss_variance
train/loss_covariance train/learning_rate train/weight_decay train/ema_momentum train/grad_norm
train/update_norm train/param_norm train/context_std train/target_std train/effective_rank
train/relative_std train/nonfinite_steps train/pred_target_cosine
train/explained_variance_level_0 train/explained_variance_level_1 train/explained_variance_summary
train/position_share train/image_share train/num_targets_level_0 train/num_targets_level_1
perf/images_per_sec perf/steps_per_sec perf/data_wait_fraction perf/peak_memory_bytes
"""


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Sends this process a real signal once the log shows `step`."""
    processes.at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def assert_same_runs(config, *workdirs: pathlib.Path) -> None:
    """Checks that the runs have the same arrays and the same log."""
    (arrays, lines), (others, other_lines) = (state_and_lines(config, w) for w in workdirs)
    jax.tree.map(np.testing.assert_array_equal, arrays, others)
    assert lines == other_lines


def test_a_run_logs_every_metric_at_increasing_steps(tiny_run):
    lines = read_metrics(tiny_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert set(line) - {"step", "eval/knn_top1", "eval/knn_top1_summary"} == set(
            METRICS.split()
        )
        assert all(np.isfinite(value) for value in line.values())
    assert lines[-1]["perf/peak_memory_bytes"] > 1e6
    np.testing.assert_allclose(lines[0]["train/learning_rate"], 1e-3 * 2 / 15, rtol=1e-5)


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(tiny_config, tmp_path, monkeypatch):
    """Tests one case; tests/faults/test_resume.py tests many settings."""
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
    assert_same_runs(tiny_config, tmp_path / "whole", tmp_path / "parts")
    assert remembered == [[], [], [1, 2, 3]], "the alarms must read the log up to the checkpoint"


def test_few_calls_are_queued_at_a_time(tiny_config, tmp_path, monkeypatch):
    """A stopped run then ends after a few steps, not after all steps up to the next log line."""
    tiny_config.train.checkpoint_every_steps = tiny_config.log.every_steps = 6
    marks, under_way, take = [], [], Loop._take

    class Marks(collections.deque):  # records the marks of the loop
        def append(self, mark):
            marks.append(mark)
            super().append(mark)

    def count_and_take(*args):
        under_way.append(sum(not mark.is_ready() for mark in marks))
        return take(*args)

    monkeypatch.setattr(loop, "collections", types.SimpleNamespace(deque=Marks))
    monkeypatch.setattr(Loop, "_take", count_and_take)
    train.train_and_evaluate(tiny_config, tmp_path)
    assert len(under_way) == len(marks) == 6
    assert max(under_way) < MAX_CALLS_UNDER_WAY


def assert_probed_at_the_end(rows, workdir):
    """Checks the scores of encoder and baselines by both probes, and the main scores in the log."""
    assert {row["encoder"] for row in rows} == {"target", "random_init", "pixels"}
    assert {row["protocol"] for row in rows} == {"linear", "knn"}
    for row in rows:
        assert 0 <= row["top1"] <= 1
        assert (row["train_size"], row["test_size"]) == (240, 60)
        assert row["step"] == (6 if row["encoder"] == "target" else 0)
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    by_level = {
        row["level"]: row["top1"]
        for row in rows
        if (row["encoder"], row["pool"], row["protocol"]) == ("target", "mean", "linear")
    }
    assert last["eval/linear_top1"] == by_level["all"]
    assert last["eval/linear_top1_level_1"] == by_level[1]


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
            patch.setattr(BatchOrder, "batches", BatchOrder.batches)  # restored at the end
            processes.stop_in_step(6)
        else:
            stop_at(patch, 6)
        with pytest.raises(Interrupted, match="SIGTERM at step 6"):
            train.train_and_evaluate(tiny_config, tmp_path)
    assert (tmp_path / "checkpoints/6").is_dir()
    assert not (tmp_path / "probe.json").exists()
    rows = train.train_and_evaluate(tiny_config, tmp_path)
    assert "already trained: step 6 of 6" in capsys.readouterr().out

    assert rows == json.loads((tmp_path / "probe.json").read_text())["results"]
    assert_probed_at_the_end(rows, tmp_path)


def save_for_ever(config, workdir: pathlib.Path) -> None:
    """Runs a command that gets one Ctrl-C in step 2 and another one during a save that hangs."""

    def hang(*_):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()

    checkpoint.ocp.CheckpointManager._finalize = hang
    processes.stop_in_step(2, signal.SIGINT)
    sys.argv = ["main"]
    cli.run(lambda: train.train_and_evaluate(config, workdir))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_command_while_it_saves(tiny_config, tmp_path):
    process = processes.CONTEXT.Process(target=save_for_ever, args=(tiny_config, tmp_path))
    process.start()
    process.join(processes.COMMAND_SEC)  # long, because a slow machine starts it late
    process.kill()
    process.join()
    assert process.exitcode == 128 + signal.SIGINT
    assert not (tmp_path / "checkpoints/2").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("own_programs")
def test_several_steps_a_call_are_one_program_and_change_no_result(
    tiny_config, tiny_run, tmp_path, monkeypatch
):
    """A call has up to 4 steps. Logs, saves and the end split the 6 steps into 2, 1, 1 and 2."""
    compiled, make = [], make_run_steps

    def counting(train_step):
        run_steps = make(train_step)
        return lambda *args: compiled.append(1) or run_steps(*args)

    monkeypatch.setattr(run, "make_run_steps", counting)
    tiny_config.train.steps_per_call = 4
    train.train_and_evaluate(tiny_config, tmp_path)
    assert len(compiled) == 1
    for one, four in zip(lines_of(tiny_run), lines_of(tmp_path), strict=True):
        np.testing.assert_allclose(one["train/loss"], four["train/loss"], rtol=1e-4)


def test_tensorboard_explains_every_curve():
    names = [(key.partition("/")[0], name) for key in showcase.CURVES
             for name in key.partition("/")[2].split(", ")]  # fmt: skip
    patterns = [f"{group}/{re.sub('<.*>', '.+', name)}" for group, name in names]
    for metric in {*METRICS.split()} | {"eval/knn_top1_summary", "eval/linear_top1_level_1"}:
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
    named = [line.replace(tiny_config.data.source, "shapes") for line in lines]
    assert max(len(line.replace(str(tmp_path), "runs/tiny")) for line in named) <= 80


@pytest.mark.usefixtures("own_programs")
def test_rates_and_length_do_not_change_the_program(tiny_config):
    """Only the arguments differ, so the compilation cache already holds the program."""

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
    """A refused command changes no file, and a command with the right config still resumes."""
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
    assert_same_runs(tiny_config, workdir, tiny_run)


def contents(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    found = (path for path in folder.rglob("*") if path.name != "lock")
    return {path: path.stat().st_mtime_ns for path in found if path != folder}


def test_a_start_that_fails_late_leaves_no_files(tiny_config, tiny_run, tmp_path, monkeypatch):
    """Covers two failures: all checkpoints are damaged, and the step does not compile."""
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

    monkeypatch.setattr(program, "return_unused_memory", fail)  # the last call in `compile_step`
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
    assert record.preprocessing["mean"] == list(tiny_config.data.mean)

    split, _ = run.open_config_source(tiny_config).load()
    for other, rule in (
        (
            Split(split.images[:231], split.labels[:231]),
            "was trained on 240 images, .* has 231 now",
        ),
        (Split(255 - split.images, split.labels), r"not known to be the same \(fingerprint"),
    ):
        save_npz(tmp_path / "moved.npz", other, other)
        with pytest.raises(InputError, match=rule):
            train.train_and_evaluate(tiny_config, workdir)


@pytest.mark.slow
def test_a_run_may_become_longer_unless_past_updates_change(tiny_config, tiny_run, tmp_path):
    """It equals a run of the full length bit for bit; tests/test_run_dir.py tests the rules."""
    workdir, shorter = tmp_path / "run", tiny_config.copy_and_resolve_references()
    shorter.train.num_steps, shorter.optim.decay_epochs = 2, 0.0  # within the 15 steps of warm-up
    train.train_and_evaluate(shorter, workdir)
    train.train_and_evaluate(tiny_config, workdir)
    (arrays, _), (whole, _) = (state_and_lines(tiny_config, place) for place in (workdir, tiny_run))
    jax.tree.map(np.testing.assert_array_equal, arrays, whole)
    tiny_config.train.num_steps, tiny_config.optim.weight_decay = 8, 0.1
    rule = (
        r"\(optim.weight_decay 0.05 -> 0.1, train.num_steps 6 -> 8\), and made update 1 at weight_"
    )
    with pytest.raises(InputError, match=rule):
        train.train_and_evaluate(tiny_config, workdir)
    assert load_config(workdir).train.num_steps == 6


def hold(workdir: pathlib.Path) -> None:
    with locked(workdir):
        (workdir / "held").touch()
        threading.Event().wait()


def test_a_workdir_is_locked_until_its_process_is_gone(tiny_config, tmp_path):
    first = processes.CONTEXT.Process(target=hold, args=(tmp_path,))
    first.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
        assert first.is_alive()
    with pytest.raises(InputError, match=f"in use by process {first.pid} on .*, since "):
        train.train_and_evaluate(tiny_config, tmp_path)
    assert not (tmp_path / "config.json").exists(), "written before the lock was taken"
    first.kill()  # no clean-up, but the lock must be released
    first.join()
    with locked(tmp_path), pytest.raises(InputError, match="in use"), locked(tmp_path):
        pass


def test_knn_during_training_uses_level_0_and_the_summary_tokens(tiny_config, tiny_run):
    line = read_metrics(tiny_run / "metrics.jsonl")[-1]
    model, params = load_encoder(tiny_run)
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
    assert found["level_0"] != found["summary"], "equal scores would not reveal a mix-up"
    assert line["eval/knn_top1"] == pytest.approx(found["level_0"])
    assert line["eval/knn_top1_summary"] == pytest.approx(found["summary"])


@pytest.mark.parametrize(("most", "save_every", "log_every", "end"), [(2, 3, 2, 3), (0, 1, 4, 1)])
def test_too_many_nonfinite_steps_end_the_run(
    tiny_config, tmp_path, monkeypatch, most, save_every, log_every, end
):
    """The run ends before it saves. The log has their number, even between two regular lines."""
    build_run = train.build_run

    def spoiled(config, source):
        built = build_run(config, source)

        def create():  # all parameters are NaN
            state, window = built.create()
            params = jax.tree.map(lambda x: x * np.nan, state.params)
            return dataclasses.replace(state, params=params), window

        return dataclasses.replace(built, create=create)

    monkeypatch.setattr(train, "build_run", spoiled)
    tiny_config.train.max_nonfinite_steps, tiny_config.log.every_steps = most, log_every
    tiny_config.train.checkpoint_every_steps = save_every
    rule = rf"max_nonfinite_steps={most}: .* {end} of {end} steps.* is step {end}: "
    with pytest.raises(InputError, match=rule + ".*loss_level_0.*No checkpoint yet"):
        train.train_and_evaluate(tiny_config, tmp_path)
    *lines, last = read_metrics(tmp_path / "metrics.jsonl")
    assert last == {"step": end, "train/nonfinite_steps": end}
    assert [(line["step"], line["train/nonfinite_steps"]) for line in lines] == [(2, 2)][:most]
    assert not any("train/loss" in line for line in lines), "JSON has no NaN"


@pytest.mark.usefixtures("blank_pictures")
def test_a_collapse_prints_a_warning_or_ends_the_run(tiny_config, tmp_path, monkeypatch, capsys):
    """The thresholds are so high that every run counts as collapsed."""
    monkeypatch.setattr(quality, "MIN_RANK_FRACTION", 2.0)
    monkeypatch.setattr(collapse, "UNTRAINED_SHARE", 100.0)
    tiny_config.log.every_steps = 1
    train.train_and_evaluate(tiny_config, tmp_path / "warns")
    assert capsys.readouterr().out.count("WARNING: target features at step 3: partial coll") == 1
    tiny_config.train.on_collapse, tiny_config.log.report = "stop", True
    with pytest.raises(InputError, match=r"on_collapse='stop': .*partial collapse"):
        train.train_and_evaluate(tiny_config, tmp_path / "stops")
    report = (tmp_path / "stops" / "report.md").read_text()
    assert "| stopped, step 3 of 6 |" in report
    assert "the run ended: train.on_collapse=stop: effective rank" in report
    assert "Run the same command again" not in report


@pytest.mark.usefixtures("short_probes")
def test_the_final_probe_has_trained_random_and_pixel_rows(
    tiny_config, tmp_path, monkeypatch, capsys
):
    tiny_config.eval.probe_at_end = True
    rows = train.train_and_evaluate(tiny_config, tmp_path)
    assert rows == json.loads((tmp_path / "probe.json").read_text())["results"]
    assert_probed_at_the_end(rows, tmp_path)

    # The same command after the end repeats no work.
    before = contents(tmp_path)
    capsys.readouterr()
    for name in ("linear_probe", "knn_probe"):
        monkeypatch.setattr(protocols, name, None)
    monkeypatch.setattr(extraction, "extract_features", None)
    assert train.train_and_evaluate(tiny_config, tmp_path) == rows
    assert contents(tmp_path) == before
    assert f"{len(rows)} of {len(rows)} scores are unchanged" in capsys.readouterr().out


@pytest.mark.slow  # loads TensorFlow
def test_tensorboard_gets_everything_and_changes_no_metric(
    tiny_config, tiny_run, tmp_path, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    monkeypatch.setattr(showcase, "MAX_SHARE", math.inf)  # pictures may take any time
    tiny_config.log.tensorboard = True
    tiny_config.log.figures_every_epochs = 0.2  # every third of 15 steps per epoch
    train.train_and_evaluate(tiny_config, tmp_path)
    assert lines_of(tmp_path) == lines_of(tiny_run)
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert tags >= {*METRICS.split(), "config", "parameters", "environment", "curves"}
    for name in ("masks", "views", "pca", "cosine", "similarity", "attention"):
        assert [e.step for e in events.Tensors(f"figures/{name}")] == [0, 3, 6]
    for name in ("figures/spectrum", "features/target"):  # from steps since the last log line
        assert [e.step for e in events.Tensors(name)] == [3, 6]
    (text,) = events.Tensors("parameters")
    assert b"patch_embedding" in text.tensor_proto.string_val[0]
    metadata = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(metadata).session_start_info
    shown = {name: value for name, value in started.hparams.items()}
    assert started.group_name == "/".join(tmp_path.parts[-2:]), "the trial has its run's name"
    assert shown["train.num_steps"].number_value == 6
    assert "optim.kind" not in shown, "fields with default values must be left out"
    assert len(tags) < 60


@pytest.mark.slow
def test_a_run_skips_unreadable_images_and_one_step_is_enough_for_a_report(
    tiny_config, tmp_path, capsys
):
    """Shapes are static, so the run is rebuilt for the remaining images."""
    (tmp_path / "photos" / "x").mkdir(parents=True)
    for i in range(24):
        path = tmp_path / "photos" / "x" / f"{i:02}.png"
        Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(path)
    path.write_bytes(path.read_bytes()[:50])
    tiny_config.data.source = f"folder:{tmp_path / 'photos'}"
    tiny_config.train.num_steps, tiny_config.eval.every_epochs = 1, 0
    train.train_and_evaluate(tiny_config, tmp_path / "run")
    assert f"1 of 24 files skipped: {path} cannot be decoded" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]
    write_report([tmp_path / "run"], tmp_path / "run", images=False)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| ? | The loss ended below its first value | fewer than two values |" in report
    assert "nan" not in report.lower()


def test_pictures_take_at_most_their_share_of_the_time():
    budget = showcase.Budget(0.02, first_cost=10.0)
    assert not budget.allows(499.0)
    assert budget.allows(500.0)
    budget.spend(7.0)  # expects 7 s for the next use: 14 s in all
    assert not budget.allows(699.0)
    assert budget.allows(701.0)
    budget.spend(2.0)  # without compilation: 9 s so far, 11 s with the next use
    assert not budget.allows(549.0)
    assert budget.allows(551.0)


@pytest.mark.slow
def test_a_report_that_cannot_be_written_does_not_fail_the_run(tiny_config, tmp_path, capsys):
    tiny_config.log.report = True
    (tmp_path / "figures").write_text("in the way")
    train.train_and_evaluate(tiny_config, tmp_path)
    said, errors = capsys.readouterr()
    assert "writing the report ..." in said.splitlines(), "a long silent step must be announced"
    assert "no report could be written" in errors
    assert f"python -m hjepa_jax.report --workdir={tmp_path}" in errors
    (tmp_path / "figures").unlink()
    write_report([tmp_path], tmp_path)
    assert "| finished, step 6 of 6 |" in (tmp_path / "report.md").read_text()


def test_data_that_probes_cannot_use_is_refused_before_training(tiny_config, tmp_path):
    """Covers a missing class 0 (labels from 1), too few images, and a probe.json without rows."""
    source, images = tiny_config.data.source, np.zeros((40, 16, 16, 3), np.uint8)
    save_npz(tmp_path / "gap.npz", *[Split(images, np.arange(40, dtype=np.int32) % 3 + 1)] * 2)
    save_npz(tmp_path / "few.npz", *[Split(images[:4], np.arange(4, dtype=np.int32))] * 2)
    tiny_config.eval.probe_at_end = True
    for name, batch_size, field, rule in (
        (f"npz:{tmp_path}/gap.npz", 16, "data.source", "no training image of class 0 (1 of 4"),
        (f"npz:{tmp_path}/few.npz", 2, "data.source", "must have at least 5"),
        (source, 16, "probe.json", "must hold results"),
    ):
        tiny_config.data.source, tiny_config.train.batch_size = name, batch_size
        if name == source:
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "probe.json").write_text("{}")
        with pytest.raises(InputError, match=re.escape(rule)) as refusal:
            train.train_and_evaluate(tiny_config, tmp_path / "run")
        assert refusal.value.field.endswith(field)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        assert (tmp_path / "run").exists() == (name == source)


def test_a_workdir_of_another_config_is_refused_before_data_is_read(tiny_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    tiny_config.data.source = "folder:absent"
    with pytest.raises(InputError, match=r"holds a run of another config \(data.source"):
        train.train_and_evaluate(tiny_config, tmp_path)
    with pytest.raises(InputError, match=r"must be a directory that can be written \(Not a dir"):
        train.train_and_evaluate(tiny_config, tmp_path / "config.json" / "run")
