"""Runs and commands in separate processes, forked from a process with all imports done."""

import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from hjepa_jax.data.order import BatchOrder
from hjepa_jax.errors import InputError, Interrupted
from hjepa_jax.runs import checkpoint, run
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.runs.progress import Progress
from hjepa_jax.runtime import cluster
from hjepa_jax.training import train

# The server imports the package but starts no backend, so that its forks can start one.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hjepa_jax.training.train", "ml_collections.config_flags"])
REPOSITORY = pathlib.Path(__file__).parent.parent
COMMAND_SEC = 900  # time limit of a command


def start(
    config: Any,
    workdir: pathlib.Path,
    *,
    stop_step: int | None = None,
    coordinator: str | None = None,
    process: tuple[int, int] = (0, 1),
) -> Any:
    """Starts or resumes a run, with its output in `<workdir>.out`.

    Args:
      config: the run's config.
      workdir: the run's directory.
      stop_step: the step in which the process gets a SIGTERM; None = never.
      coordinator: host and port of process 0, see `cluster.member`; None = a single process.
      process: (index, number of processes). Process 1 prints to `<workdir>.1.out`, and so on.

    Returns:
      The process. It has the exit code of the command: 0, 2 or 143.
    """
    started = CONTEXT.Process(target=_work, args=(config, workdir, stop_step, coordinator, process))
    started.start()
    return started


def start_several(config: Any, workdir: pathlib.Path, num: int, **kwargs: Any) -> list[Any]:
    """Starts or resumes a run in `num` processes; see `start`."""
    coordinator = free_address()
    return [
        start(config, workdir, coordinator=coordinator, process=(i, num), **kwargs)
        for i in range(num)
    ]


def free_address() -> str:
    """Returns host and port of an unused address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def finish(config: Any, workdir: pathlib.Path, *, num: int = 1, **kwargs: Any) -> int:
    """Like `start`, but waits for the end and returns the exit code that all processes share."""
    if num == 1:
        started = [start(config, workdir, **kwargs)]
    else:
        started = start_several(config, workdir, num, **kwargs)
    for process in started:
        process.join()
    codes = {process.exitcode for process in started}
    assert len(codes) == 1, [printed(workdir, i) for i in range(num)]
    return codes.pop()


def printed(workdir: pathlib.Path, process: int = 0) -> str:
    """Returns the output of all runs in `workdir` so far, from the process with this index."""
    return _out(workdir, process).read_text()


def _out(workdir: pathlib.Path, process: int) -> pathlib.Path:
    return workdir.with_suffix(f".{process}.out" if process else ".out")


def call(fn: Callable[..., Any], *args: Any) -> Any:
    """Returns `fn(*args)`, called in a separate process that has started no backend."""
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder, "result.json")
        process = CONTEXT.Process(target=_write_result, args=(result, fn, *args))
        process.start()
        process.join()
        assert process.exitcode == 0
        return json.loads(result.read_text())


def _write_result(result: pathlib.Path, fn: Callable[..., Any], *args: Any) -> None:
    result.write_text(json.dumps(fn(*args)))


def run_at_full_speed(*arguments: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in `folder` with full compiler optimization, for tests that train for long."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def run_command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m <module> <arguments>` in the repository, without the time for imports.

    The command runs as usual, with its flags, exit status and output. Only the interpreter has
    already loaded the libraries.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = pathlib.Path(folder, "out"), pathlib.Path(folder, "err")
        process = CONTEXT.Process(target=_run_module, args=(module, arguments, out, err))
        process.start()
        process.join(COMMAND_SEC)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired([module, *arguments], COMMAND_SEC)
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


def lines_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the log of a run without the metrics that depend on time."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def state_and_lines(config: Any, workdir: pathlib.Path) -> tuple[dict[str, Any], list[Any]]:
    """Returns all arrays of the newest checkpoint of a run by path, and the log of the run."""
    built = train.build_run(config, run.open_config_source(config))
    with checkpoint.Checkpoints(workdir, config=config) as checkpoints:
        trees = jax.device_get(checkpoints.restore(*built.create()))
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, lines_of(workdir)


def at_step(patch: Any, step: int, act: Callable[[], Any]) -> None:
    """Makes later runs in this process call `act` once the log shows `step`."""
    show = Progress.show

    def show_and_act(self, at, **kwargs):
        show(self, at, **kwargs)
        if at == step:
            act()

    patch.setattr(Progress, "show", show_and_act)


def stop_in_step(step: int, signum: int = signal.SIGTERM) -> None:
    """Makes this process send itself a real signal when a run requests the batch of `step`."""
    batches = BatchOrder.batches

    def batches_and_signal(self, first, count, *, size):
        if first < step <= first + count:
            os.kill(os.getpid(), signum)
        return batches(self, first, count, size=size)

    BatchOrder.batches = batches_and_signal


def _work(
    config: Any, workdir: pathlib.Path, stop_step: Any, coordinator: Any, process: tuple[int, int]
) -> None:
    out = os.open(_out(workdir, process[0]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if stop_step is not None:
        stop_in_step(stop_step)
    index, num = process
    try:
        with cluster.member(coordinator, num_processes=num, process_id=index):
            train.train_and_evaluate(config, workdir)
    except InputError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(error.status)
    except Interrupted as stop:
        os._exit(stop.status)
