"""Trains a run from start to report: build, restore, loop, probe, report."""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Num

from hjepa_jax.config import Config
from hjepa_jax.config.validation import validate
from hjepa_jax.data.base import Source, Split, check_memory
from hjepa_jax.data.fingerprint import content, fingerprint
from hjepa_jax.errors import InputError, Interrupted, first_line
from hjepa_jax.evaluation.judge import judge_run
from hjepa_jax.evaluation.protocols import Protocol
from hjepa_jax.evaluation.results import format_tables, headline_scores
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.method.window import LogWindow
from hjepa_jax.runs.checkpoint import Checkpoints
from hjepa_jax.runs.checkpoint_meta import read_saved
from hjepa_jax.runs.history import read_history
from hjepa_jax.runs.lock import claimed, is_claimed
from hjepa_jax.runs.logger import RunLogger, SilentLogger, load_writers
from hjepa_jax.runs.record import RunRecord, make_record
from hjepa_jax.runs.run import (
    Program,
    Run,
    build_run,
    open_config_source,
    start_table,
    with_statistics,
)
from hjepa_jax.runs.scores import rows_to_add_to
from hjepa_jax.runs.workdir import (
    check_workdir,
    checkpoint_sizes,
    prepare_workdir,
    report_is_up_to_date,
    with_recorded_start,
    writing,
)
from hjepa_jax.runtime import cluster
from hjepa_jax.runtime.backend import select_platform
from hjepa_jax.runtime.paths import expand_paths
from hjepa_jax.training import warm_start
from hjepa_jax.training.judged import Judged, load_judged
from hjepa_jax.training.loop import Loop
from hjepa_jax.training.program import compile_step


def train_and_evaluate(config: Config, workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """Trains or resumes the run in `workdir`, and evaluates it at the end.

    If there are several processes (`cluster.member`), each calls this function. Only process 0
    writes files, and it runs the probes after the others have left.

    Args:
      config: a complete config.
      workdir: the run's directory; made if it is missing.

    Returns:
      The rows of probe.json; none without `eval.probe_at_end`, or in the other processes.

    Raises:
      InputError: for input that the user can correct.
      Interrupted: on SIGINT or SIGTERM, after saving.
      KeyboardInterrupt: on a second SIGINT, without waiting for the save.
    """
    workdir = pathlib.Path(workdir)
    validate(config)
    config = expand_paths(config)
    backend = select_platform(config.platform, cpu_devices=config.parallel.cpu_devices)
    with writing(workdir):
        config = with_recorded_start(config, workdir, read_saved(workdir))
    cluster.by_first(lambda: _check(config, workdir))  # before a long download
    parts = _load(config, workdir, backend)
    cluster.by_first(lambda: _check(config, workdir, parts.record))
    _check_same_everywhere(config, parts.record)
    if not checkpoint_sizes(workdir):  # a resumed run does not need it
        warm_start.check_source(config)
    begun = []
    with _claimed(parts) as record_start:

        def begin() -> None:
            record_start()
            begun.append(True)

        try:
            rows = _train_and_judge(parts, begin)
        except InputError as error:  # too many non-finite steps, a collapse, a full disk
            cluster.leave(str(error))
            if begun:
                _report(parts)
            raise
        except Interrupted:  # all processes stop; some may take longer to close
            cluster.leave()
            raise
        _report(parts)
        return rows


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The parts of a run."""

    run: Run
    source: Source
    train: Split
    test: Split
    judged: Judged
    workdir: pathlib.Path
    backend: str
    record: RunRecord


def _check(config: Config, workdir: pathlib.Path, data: RunRecord | None = None) -> None:
    """See `check_workdir`."""
    with writing(workdir):
        saved = read_saved(workdir)
    check_workdir(config, workdir, saved=saved, data=data)


def _load(config: Config, workdir: pathlib.Path, backend: str) -> _Parts:
    """Loads the images and builds the run."""
    _say(f"opening {config.data.source} for {workdir} ...")
    with cluster.first_process_first():  # process 0 downloads and scans the data
        source = open_config_source(config, quiet=not cluster.is_first())
        # Refuses bad configs before images are read.
        run = build_run(with_statistics(config, source, None), source)
        _say(start_table(run, source, workdir))
        train, test = source.load()
    found: dict[str, Any] = {"num_train": len(train.images), "num_test": len(test.images)}
    if train.labels is None:
        found["class_names"] = ()
    info = dataclasses.replace(source.info, **found)
    measured = with_statistics(config, source, train)
    if measured is not config and cluster.is_first():
        print(f"data.mean={measured.data.mean}, data.std={measured.data.std}", flush=True)
    if info != source.info or measured is not config:  # for example after unreadable files
        source, config = dataclasses.replace(source, info=info), measured
        run = build_run(config, source)
    if source.originals is not None:
        check_memory(source.name, len(train.images) * source.train_bytes)
    judged = load_judged(config, source, train, test)
    data = fingerprint(train, source.records)
    record = make_record(config, source, run.schedules, fingerprint=data)
    return _Parts(run, source, train, test, judged, workdir, backend, record)


def _say(text: str) -> None:
    if cluster.is_first():
        print(text, flush=True)


@contextlib.contextmanager
def _claimed(parts: _Parts) -> Iterator[Callable[[], None]]:
    """Holds the work directory in process 0 (see `claimed`).

    Yields:
      A function that writes config.json and run.json. All processes must call it when all checks
      have passed.
    """
    config, workdir, record = parts.run.config, parts.workdir, parts.record
    with contextlib.ExitStack() as held:
        claims: list[Callable[[], None]] = []  # only process 0 has one

        def claim() -> None:
            claims.append(held.enter_context(claimed(workdir)))
            _check(config, workdir, record)  # checked again: another run may have started meanwhile
            if config.eval.probe_at_end:  # before hours of training
                with writing(workdir):
                    rows_to_add_to(workdir / "probe.json")

        def write() -> None:
            prepare_workdir(config, workdir, record, saved=read_saved(workdir))
            claims[0]()

        cluster.by_first(claim)
        if cluster.largest(not is_claimed(workdir)):
            raise InputError("--workdir", str(workdir), "must be shared by all processes")
        yield lambda: cluster.by_first(write)


def _check_same_everywhere(config: Config, record: RunRecord) -> None:
    """Refuses processes with different configs or data."""
    shared = config.to_dict()
    del shared["data"]["dir"]  # may differ between machines
    digest = zlib.crc32(json.dumps(shared).encode()) >> 1
    cluster.check_same("--config", "", digest)
    images = zlib.crc32(content(record.data["fingerprint"]).encode()) >> 1
    cluster.check_same("data.source", config.data.source, images)


def _report(parts: _Parts) -> None:
    """Writes the report of the run. A failure only prints a warning."""
    workdir = parts.workdir
    if not parts.run.config.log.report or not cluster.is_first():
        return
    if report_is_up_to_date(workdir):
        print("report.html is up to date", flush=True)
        return
    print("writing the report ...", flush=True)
    try:
        from hjepa_jax.reporting.publish import write_report  # matplotlib loads slowly

        write_report([workdir], workdir, splits=(parts.train, parts.test))
    except Exception as error:
        command = f"python -m hjepa_jax.report --workdir={shlex.quote(str(workdir))}"
        message = f"warning: no report could be written: {first_line(error)}; try {command}"
        print(message, file=sys.stderr, flush=True)


def _train_and_judge(parts: _Parts, begin: Callable[[], None]) -> list[dict[str, Any]]:
    """Trains and evaluates a run that is built and holds its work directory.

    Args:
      parts: the parts of the run.
      begin: called before the first step, when all checks have passed.
    """
    run, workdir, train = parts.run, parts.workdir, parts.train
    config = run.config
    with contextlib.ExitStack() as opened:
        with writing(workdir):
            checkpoints = opened.enter_context(
                Checkpoints(workdir, config=config, data=parts.record.fingerprint, owner=True)
            )
            state, window, program = _start(parts, checkpoints)
            logger = SilentLogger()
            if cluster.is_first():
                tensorboard, step = config.log.tensorboard, int(state.step)
                logger = RunLogger(workdir, tensorboard=tensorboard, resume_step=step)
        closing = contextlib.ExitStack()
        closing.enter_context(writing(workdir))
        closing.callback(logger.close)
        with closing:
            judged = parts.judged.train if parts.judged.has_classes else None
            loop = Loop(
                run, workdir, train, lambda: _training_images(parts), parts.source.records,
                checkpoints, logger, program, judged=judged,
            )  # fmt: skip
            state = loop.run(state, window, begin)
            encoders = {"target": state.target_params, "random_init": run.create()[0].target_params}
            encoders = run.placement.local(encoders)
            opened.close()  # the last checkpoint is on disk
            cluster.leave()
            if not config.eval.probe_at_end or not cluster.is_first():
                return []
            return _judge(parts, encoders, int(state.step), logger)


def _training_images(parts: _Parts) -> Num[np.ndarray, "n H W C"]:
    """Returns the images to train on: larger originals if crops are cut from them."""
    originals = parts.source.originals
    return parts.train.images if originals is None else originals(parts.train)


def _start(parts: _Parts, checkpoints: Checkpoints) -> tuple[TrainState, LogWindow, Program | None]:
    """Returns state and metrics window at the start, and the compiled step.

    The step is None if no step is left.
    """
    run, workdir, program = parts.run, parts.workdir, None
    latest = checkpoints.latest_step()
    cluster.check_same("--workdir", str(workdir), -1 if latest is None else latest)
    if latest is None and not run.config.train.init_from:
        # XLA compiles without Python's global lock. Meanwhile this thread creates the state and
        # loads TensorFlow.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            compiling = pool.submit(compile_step, run, parts.backend, step=0)
            state, window = run.create()
            if run.config.log.tensorboard and cluster.is_first():
                with contextlib.suppress(ImportError):  # `RunLogger` names the missing ones
                    load_writers()
        return state, window, compiling.result()
    state, window = run.create()
    if latest is not None:
        state, window = checkpoints.restore(state, window)
    else:
        state = warm_start.start_from(run.config.train.init_from, run, state)
    if (step := int(state.step)) < run.schedules.num_steps:
        program = compile_step(run, parts.backend, step=step)
    return state, window, program


def _judge(
    parts: _Parts, encoders: dict[str, Any], step: int, logger: RunLogger
) -> list[dict[str, Any]]:
    """Runs the probes on the trained encoder and its baselines."""
    config, judged = parts.run.config, parts.judged
    with writing(parts.workdir):
        rows = judge_run(
            parts.workdir,
            config,
            parts.run.model,
            encoders,
            judged.train,
            judged.test,
            source=judged.source,
            step=step,
            protocol=Protocol(num_val=config.eval.num_val, batch_size=config.eval.batch_size),
        )
        if not (scores := headline_scores(rows)):
            return rows
        history = read_history(parts.workdir / "metrics.jsonl")
        logged = {n: dict(zip(*history.series(n), strict=True)).get(step) for n in scores}
        if logged != scores:
            logger.scalars(step, scores)
            logger.texts(step, {"probe": f"```\n{format_tables(rows)}\n```"})
    return rows
