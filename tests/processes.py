"""Runs and commands in processes of their own, forked from one that has everything imported."""

import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
from typing import Any

from hjepa_jax import train
from hjepa_jax.data.pipeline import BatchOrder
from hjepa_jax.errors import InputError

# The server imports the package and starts no backend, so that a fork of it may.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hjepa_jax.train", "ml_collections.config_flags"])
REPOSITORY = pathlib.Path(__file__).parent.parent


def start(config: Any, workdir: pathlib.Path, *, stop_step: int | None = None) -> Any:
    """Starts or resumes a run; what it prints goes to `<workdir>.out`.

    Args:
      config: the run's config.
      workdir: the run's directory.
      stop_step: the step in which the process gets a SIGTERM; None for never.

    Returns:
      The process. Its exit code is that of the command: 0, 2 or 143.
    """
    process = CONTEXT.Process(target=_work, args=(config, workdir, stop_step))
    process.start()
    return process


def finish(config: Any, workdir: pathlib.Path, *, stop_step: int | None = None) -> int:
    """Like `start`, but waits for the end; returns the exit code."""
    process = start(config, workdir, stop_step=stop_step)
    process.join()
    return process.exitcode


def printed(workdir: pathlib.Path) -> str:
    """What the runs in `workdir` have printed."""
    return workdir.with_suffix(".out").read_text()


def run_command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m <module> <arguments>` in the repository, without the seconds of its imports.

    It is the real entry, its flags, exit status and output included; only the interpreter is one
    that has loaded the libraries before.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = pathlib.Path(folder, "out"), pathlib.Path(folder, "err")
        process = CONTEXT.Process(target=_run_module, args=(module, arguments, out, err))
        process.start()
        process.join()
        return subprocess.CompletedProcess(
            [module, *arguments], process.exitcode, out.read_text(), err.read_text()
        )


def _run_module(
    module: str, arguments: tuple[str, ...], out: pathlib.Path, err: pathlib.Path
) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(REPOSITORY)
    sys.path.insert(0, str(REPOSITORY))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def stop_in_step(step: int) -> None:
    """From now on this process gets a real SIGTERM when the batch of `step` is asked for."""
    batches = BatchOrder.batches

    def batches_and_signal(self, first, count, *, size):
        if first < step <= first + count:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(self, first, count, size=size)

    BatchOrder.batches = batches_and_signal


def _work(config: Any, workdir: pathlib.Path, stop_step: int | None) -> None:
    out = os.open(workdir.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if stop_step is not None:
        stop_in_step(stop_step)
    try:
        train.train_and_evaluate(config, workdir)
    except InputError as error:
        print(error, flush=True)
        os._exit(2)
    except train.Interrupted as stop:
        os._exit(128 + stop.signum)
