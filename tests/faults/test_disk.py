"""Runs while a disk fills up, becomes read-only or loses the data."""

import os
import pathlib
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from hjepa_jax.errors import InputError, Interrupted
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.training import train
from tests.processes import at_step, state_and_lines

pytestmark = [
    pytest.mark.slow,
    # After an error, TensorStore reports to event loops that Orbax has closed. Some of its threads
    # fail too.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture
def small_disk(tmp_path: pathlib.Path):
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"there is no mount command: {error}")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: pathlib.Path) -> None:
    with (place / "ballast").open("ab", buffering=0) as file:
        for size in (65536, 512, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def newest_step(config, workdir):
    arrays, _ = state_and_lines(config, workdir)
    return int(arrays["[0].step"])


def long_run(config):
    config.train.num_steps = 20
    config.log.every_steps = 1
    config.eval.every_epochs = 0.0


def test_a_run_stops_on_a_full_disk_and_resumes_on_a_freed_one(
    tiny_config, small_disk, tmp_path, monkeypatch
):
    long_run(tiny_config)
    train.train_and_evaluate(tiny_config, tmp_path / "whole")
    workdir = small_disk / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: fill(small_disk))
        with pytest.raises(InputError, match=r"--workdir=.*(No space left|RESOURCE_EXHAUSTED)"):
            train.train_and_evaluate(tiny_config, workdir)
    fill(small_disk)  # again, because the last file is incomplete
    with pytest.raises(InputError, match=r"--workdir=.*No space left"):  # a second start
        train.train_and_evaluate(tiny_config, workdir)
    (small_disk / "ballast").unlink()
    assert newest_step(tiny_config, workdir) >= 3  # the save of step 6 may be incomplete
    train.train_and_evaluate(tiny_config, workdir)
    once, twice = (state_and_lines(tiny_config, place) for place in (tmp_path / "whole", workdir))
    jax.tree.map(np.testing.assert_array_equal, once[0], twice[0])
    steps = [line["step"] for line in read_metrics(workdir / "metrics.jsonl")]
    assert steps == list(range(1, 21))


def test_a_read_only_disk_gives_one_line_and_loses_nothing(
    tiny_config, small_disk, tmp_path, monkeypatch, run_module
):
    """The disk changes between two starts, because a remount fails if files are open."""
    long_run(tiny_config)
    workdir = small_disk / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train.train_and_evaluate(tiny_config, workdir)

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)

    remount("ro")
    with pytest.raises(InputError, match=r"--workdir=.*Read-only file system"):
        train.train_and_evaluate(tiny_config, workdir)
    result = run_module("hjepa_jax.probe", f"--workdir={workdir}", "--protocols=knn")
    assert result.returncode == 2, result.stderr
    assert "Read-only file system" in result.stderr
    assert "Traceback" not in result.stderr
    remount("rw")
    train.train_and_evaluate(tiny_config, workdir)
    assert newest_step(tiny_config, workdir) == 20


def test_data_deleted_during_a_run_matter_only_on_resume(tiny_config, tmp_path, monkeypatch):
    long_run(tiny_config)
    data = tmp_path / "data.npz"
    shutil.copy(tiny_config.data.source.removeprefix("npz:"), data)
    before = tiny_config.copy_and_resolve_references()
    tiny_config.data.source = f"npz:{data}"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.remove(data))
        train.train_and_evaluate(tiny_config, tmp_path / "run")
    assert newest_step(before, tmp_path / "run") == 20
    with pytest.raises(InputError, match=r"data.source=.*no such file"):
        train.train_and_evaluate(tiny_config, tmp_path / "run")
