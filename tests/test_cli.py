"""The commands. Each runs in its own process, as a user starts it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import hjepa_jax
from hjepa_jax.config import base_config
from hjepa_jax.config.fields import flatten
from hjepa_jax.runs.history import read_metrics
from tests.processes import run_command

MAIN = "hjepa_jax.main"
SHAPES = "--config=configs/shapes_tiny.py"


def tiny_overrides(shapes_npz: str) -> dict[str, object]:
    """Returns overrides that shrink shapes_tiny to seconds."""
    return {
        "data.source": shapes_npz, "data.image_size": 16, "model.width": 16, "model.depth": 1,
        "model.num_heads": 2, "model.predictor_width": 8, "model.predictor_depth": 1,
        "parallel.cpu_devices": 1, "mask.num_blocks": 2, "mask.scale": "(0.25,0.25)",
        "train.batch_size": 16, "train.num_steps": 4, "eval.every_epochs": 0, "log.every_steps": 2,
        "log.tensorboard": False, "log.report": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tiny_flags(shapes_npz):
    """Flags for a run of shapes_tiny that takes seconds."""
    overrides = tiny_overrides(shapes_npz)
    return [SHAPES, *(f"--config.{field}={value}" for field, value in overrides.items())]


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Expects status 2 and one line on stderr with all the words."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    if len(lines) > 1 and ": train " in lines[0]:  # a line about the images of the run comes first
        lines = lines[1:]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.slow
def test_train_probe_embed_and_load_work_together(run_module, tiny_flags, tmp_path):
    workdir, again = tmp_path / "run", tmp_path / "a copy, by hand"
    read_rows = lambda: json.loads((workdir / "probe.json").read_text())["results"]

    def run(module, *arguments):
        result = run_module(f"hjepa_jax.{module}", *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "random-init" in run("main", *tiny_flags, f"--workdir={workdir}")
    first, encoders = read_rows(), "--encoders=target,online"
    run("probe", f"--workdir={workdir}", "--protocols=knn", encoders, "--nokeep_features")
    rows = read_rows()
    assert {row["encoder"] for row in rows} == {"target", "online", "random_init", "pixels"}
    assert rows[: len(first)] == first, "the probe must agree with the probe at the end of the run"

    shutil.copytree(workdir, again)
    arguments = ["--protocols=lowshot,fewshot,quality,attentive,finetune", "--encoders=target"]
    arguments += ["--levels=1", "--finetune_epochs=0.5", "--lowshot_labels=1,0.1"]
    told = run("probe", f"--workdir={workdir}", f"--workdir={again}", *arguments)
    assert told.splitlines()[-1] == "no mean: runs have the same seed (0, 0)"
    rows = [row for row in read_rows() if row["encoder"] == "target"]
    found = {(row["protocol"], row["level"], row.get("labels")) for row in rows}
    assert found >= {("lowshot", 1, "10 %"), ("fewshot", 1, "5-shot"), ("quality", 1, None)}
    assert found >= {("attentive", 0, None), ("finetune", 0, "0.5 epochs")}
    assert not found & {("lowshot", 0, "10 %")}

    output = tmp_path / "features.npz"
    source = next(f for f in tiny_flags if "data.source" in f).partition("npz:")[2]
    run("embed", f"--workdir={workdir}", f"--input={source}", f"--output={output}")
    features = np.load(output)
    assert features["train_level_0"].shape == (240, 16)
    assert features["test_labels"].shape == (60,)
    found = hjepa_jax.load(workdir).embed(np.load(source)["test_images"])
    np.testing.assert_allclose(found["level_1"], features["test_level_1"], atol=1e-4)


@pytest.mark.slow
def test_dry_run_prints_sizes_and_writes_nothing(run_module, tiny_flags, tmp_path):
    command = (MAIN, *tiny_flags, f"--workdir={tmp_path / 'run'}", "--dry_run")
    result = run_module(*command, "--json")
    assert result.returncode == 0, result.stderr
    sizes = json.loads(result.stdout)
    names = "params_total params_trainable num_patches num_levels num_context num_steps step_bytes"
    names += " steps_per_epoch images_per_update flops_per_image state_bytes images_bytes platform"
    assert set(sizes) == {*names.split()}
    assert (sizes["num_patches"], sizes["steps_per_epoch"]) == (16, 15)
    assert sizes["images_bytes"] == 240 * 16 * 16 * 3
    assert sizes["state_bytes"] > 4 * sizes["params_total"]
    assert sizes["step_bytes"] > sizes["state_bytes"] + sizes["images_bytes"]
    lines = run_module(*command).stdout.splitlines()
    assert f"{sizes['params_trainable']:,} trained" in next(x for x in lines if "param" in x)
    assert len(lines) == 7
    assert max(map(len, lines)) <= 80
    assert not (tmp_path / "run").exists()


def test_the_command_config_explains_every_field(run_module):
    result = run_module("hjepa_jax.show_config", "cifar10_tiny", "--config.optim.learning_rate=7.5")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "* learning_rate           7.5           peak, after the warm-up" in lines
    assert "  clip_norm               3.0           largest global gradient norm; 0 = no" in lines
    assert len([x for x in lines if re.match(r"[* ] \w", x)]) == len(
        flatten(base_config().to_dict())
    )
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_sigterm_saves_the_run(tiny_flags, tmp_path):
    workdir = tmp_path / "run"
    flags = [f for f in tiny_flags if "num_steps" not in f and "every_steps" not in f]
    flags += ["--config.log.every_steps=1", "--config.eval.probe_at_end=False"]
    flags += ["--config.train.num_steps=100000", f"--workdir={workdir}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-m", MAIN, *flags], env=environment, **pipes)
    assert process.stdout is not None
    for line in process.stdout:
        if (shown := re.search(r"step (\d+)/", line)) and int(shown[1]) >= 3:
            process.send_signal(signal.SIGTERM)
            break
    started = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - started < 50  # 10 s on an idle machine
    assert process.returncode == 143
    assert "run the same command to go on" in stderr
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert saved >= 3
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, saved + 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--colour=red"], ["colour"]),
        (["stray"], ["stray"]),
        (["--flagfile=/nowhere"], ["flagfile", "/nowhere"]),
        (["--config.model.patch_size=5"], ["data.image_size=32", "model.patch_size=5"]),
        (["--config.mask.num_blocks=40"], ["mask.scale", "leave no context"]),
        (["--config.data.source=npz:nowhere.npz"], ["data.source", "nowhere.npz"]),
        (["--workdir=/proc/nowhere"], ["--workdir", "/proc/nowhere"]),
    ],
    ids=range(7),
)
@pytest.mark.slow
def test_bad_input_ends_in_one_line_and_status_2(run_module, arguments, words, tmp_path):
    workdir = [] if any("workdir" in a for a in arguments) else [f"--workdir={tmp_path / 'run'}"]
    assert_refused(run_module(MAIN, SHAPES, *workdir, *arguments), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_closed_pipe_ends_the_command_silently(tiny_run, tmp_path):
    """As in `... | head -1`. The error must not be reported as one of the work directory."""
    command = [sys.executable, "-u", "-m", "hjepa_jax.report", "--noimages"]
    command += [f"--workdir={tiny_run}", f"--output={tmp_path}"]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_missing_config_flag_and_file_are_refused(run_module):
    assert_refused(run_module(MAIN), "--config: must be given")
    assert_refused(run_module(MAIN, "--config=configs/nowhere.py"), "configs/nowhere.py")
    words = ("configs/shape_tiny.py", "the package: cifar10_patches, ", "mean shapes_tiny?")
    assert_refused(run_module(MAIN, "configs/shape_tiny.py"), *words)


def test_probing_an_empty_directory_is_refused(run_module, tmp_path):
    refusal = run_module("hjepa_jax.probe", f"--workdir={tmp_path}")
    assert_refused(refusal, "--workdir", str(tmp_path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_flags):
    """A work directory with a checkpoint, trained by the command."""
    workdir = tmp_path_factory.mktemp("run")
    flags = [*tiny_flags, "--config.eval.probe_at_end=False", f"--workdir={workdir}"]
    assert run_command(MAIN, *flags).returncode == 0
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocols=linear,tarot"], ["--protocols", "tarot", "lowshot"]),
        (["--protocols="], ["--protocols", "linear"]),
        (["--encoders=teacher"], ["--encoders", "teacher"]),
        (["--levels=top"], ["--levels", "top"]),
        (["--pools=max"], ["--pools", "max"]),
        (["--protocols=attentive", "--levels=7"], ["--levels=7", "0 to 1"]),
        (["--protocols=finetune", "--finetune_epochs=inf"], ["--finetune_epochs=inf"]),
        (["--protocols=finetune", "--finetune_epochs=1e308"],
         ["--finetune_epochs=1e+308: must be at most 2147483647 steps"]),
        (["--platform=abacus"], ["platform='abacus'", "cuda"]),
        (["--seed=4294967296"], ["seed", "4294967296"]),
        (["--step=99999999999"], ["--step", "last, best"]),
        (["--step=99"], ["--step=99", "[4]"]),
        (["--step=best"], ["--step", "best", "k-NN"]),
        (["--num_layers=2"], ["--num_layers=2", "from 1 to 1"]),
        (["--workdir="], ["--workdir=''", "not empty"]),
    ],
    ids=range(15),
)  # fmt: skip
def test_bad_requests_to_the_probe_end_in_one_line_and_status_2(
    run_module, trained, arguments, words
):
    assert_refused(run_module("hjepa_jax.probe", f"--workdir={trained}", *arguments), *words)
    assert not (trained / "probe.json").exists()


def test_import_starts_no_backend_and_imports_no_tensorflow():
    code = (
        "import sys, hjepa_jax\n"
        "slow = {'jax', 'tensorflow', 'matplotlib', 'sklearn', 'orbax'} & {*sys.modules}\n"
        "assert hjepa_jax.load and not slow, slow\n"
        "import hjepa_jax.api, hjepa_jax.main, hjepa_jax.training.train\n"
        "assert 'tensorflow' not in sys.modules, 'tensorflow'\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend has started'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
