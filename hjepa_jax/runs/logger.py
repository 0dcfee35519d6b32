"""Writes the metrics of a run: metrics.jsonl, and TensorBoard through CLU's writers."""

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import time
from typing import Any

import numpy as np
from jaxtyping import Float

from hjepa_jax.errors import InputError
from hjepa_jax.runs.history import end_of_step
from hjepa_jax.runtime.backend import quiet_tensorflow
from hjepa_jax.runtime.names import encodable

EVENTS = "events.out.tfevents."  # followed by seconds since 1970, host and process


class RunLogger:
    """Writes one run's metrics.

    Args:
      workdir: the run's directory.
      tensorboard: whether to write TensorBoard events, pictures and texts (imports TensorFlow).
      resume_step: step of the checkpoint at which the run resumes. Later lines of metrics.jsonl
        and later points in TensorBoard are dropped: a killed run logged them after its checkpoint.

    Raises:
      InputError: if TensorBoard is asked for and its packages are missing.
    """

    def __init__(self, workdir: pathlib.Path, *, tensorboard: bool, resume_step: int = 0):
        self._workdir, self.tensorboard, self._resume_step = workdir, tensorboard, resume_step
        needed = ("clu", "tensorflow", "tensorboard")
        if tensorboard and not all(map(importlib.util.find_spec, needed)):
            rule = "needs the packages clu, tensorflow and tensorboard; False does without"
            raise InputError("log.tensorboard", True, rule)
        self._pending: dict[str, Any] = {}
        path = workdir / "metrics.jsonl"
        self._file = path.open("a", encoding="utf-8")
        if (end := end_of_step(path, resume_step)) != path.stat().st_size:
            self._file.truncate(end)

    @functools.cached_property
    def _writer(self) -> Any:
        """CLU's writer, or None. Created on first use, because TensorFlow takes seconds to load."""
        if not self.tensorboard:
            return None
        return _tensorboard_writer(self._workdir, resume_step=self._resume_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds values to the line of `step`, which `end_line` writes."""
        if self._pending.get("step", step) != step:
            self.end_line()
        self._pending = {"step": step, **self._pending, **values}
        if self._writer:
            self._writer.write_scalars(step, values)

    def end_line(self) -> None:
        """Writes the pending line to disk, so that no checkpoint is newer than its metrics."""
        if self._pending:
            self._file.write(json.dumps(self._pending) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._pending = {}

    def images(self, step: int, images: dict[str, Float[np.ndarray, "B H W 3"]]) -> None:
        """Sends pictures, pixels in [0, 1], to TensorBoard."""
        if self._writer:
            self._writer.write_images(step, images)

    def flush(self) -> None:
        """Waits until everything sent to TensorBoard is written; a thread encodes the pictures."""
        if self._writer:
            self._writer.flush()

    def histograms(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Sends the distributions of arrays to TensorBoard."""
        if self._writer:
            self._writer.write_histograms(step, arrays)

    def texts(self, step: int, texts: dict[str, str]) -> None:
        """Sends texts, in Markdown, to TensorBoard."""
        if self._writer:
            self._writer.write_texts(step, {key: encodable(text) for key, text in texts.items()})

    def hparams(self, name: str, values: dict[str, Any]) -> None:
        """Sends the configuration to TensorBoard's HPARAMS tab, as the trial `name`."""
        if not self._writer:
            return
        import tensorflow as tf
        from tensorboard.plugins.hparams import api

        plain = {k: encodable(v) if isinstance(v, str) else v for k, v in values.items()}
        # CLU's writer would name the trial by a digest.
        writer = tf.summary.create_file_writer(str(self._workdir), filename_suffix=".hparams")
        with writer.as_default():
            api.hparams(plain, trial_id=encodable(name))
        writer.close()

    def close(self) -> None:
        """Writes the pending line and closes all files."""
        with contextlib.ExitStack() as closing:  # all of them, even on a full disk
            if "_writer" in vars(self) and self._writer:
                closing.callback(self._writer.close)
            closing.callback(self._file.close)
            self.end_line()


class SilentLogger(RunLogger):
    """The logger of all processes but the first: writes nothing."""

    def __init__(self):
        self._pending, self.tensorboard = {}, False

    def end_line(self) -> None:
        self._pending = {}

    def close(self) -> None:
        pass


def load_writers() -> Any:
    """Returns CLU's writers. The first call takes seconds, because it imports TensorFlow."""
    quiet_tensorflow()
    from clu import metric_writers

    return metric_writers


def _tensorboard_writer(workdir: pathlib.Path, *, resume_step: int | None = None) -> Any:
    """Returns CLU's writer of TensorBoard events.

    Args:
      workdir: the folder of the event file.
      resume_step: events of later steps are dropped from the existing files; None keeps all.
    """
    metric_writers = load_writers()
    if resume_step is not None:
        _purge_events_after(workdir, resume_step)
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))


def _purge_events_after(workdir: pathlib.Path, step: int) -> None:
    """Tells TensorBoard to forget the events of later steps in the existing files.

    TensorBoard does so when it reads a "session started" event. CLU and tf.summary cannot write
    one, so this writes it into a small file. TensorBoard reads files in the order of their names:
    the name must sort after the existing files and before the next file of the run.
    """
    seconds = [file.name.removeprefix(EVENTS)[:10] for file in workdir.glob(f"{EVENTS}*")]
    if not seconds:
        return
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    while max(seconds) == (now := f"{int(time.time()):010}"):
        time.sleep(0.05)  # until the second of the newest file is over
    protos: Any = event_pb2  # its classes are made at run time
    version = protos.Event(wall_time=time.time(), file_version="brain.Event:2")
    started = protos.SessionLog(status=protos.SessionLog.START)
    start = protos.Event(wall_time=time.time(), step=step + 1, session_log=started)
    # Host names never begin with "-", which sorts before letters and digits.
    with (workdir / f"{EVENTS}{now}.-resumed").open("wb") as file:
        # TensorBoard takes the first start as the beginning of the run. Only the second one purges.
        for event in (version, start, start):
            RecordWriter(file).write(event.SerializeToString())


def write_tensorboard(
    workdir: pathlib.Path, step: int, values: dict[str, float], texts: dict[str, str]
) -> None:
    """Adds scalars and texts to the TensorBoard events of a run, from outside of its training."""
    writer = _tensorboard_writer(workdir)
    writer.write_scalars(step, values)
    writer.write_texts(step, texts)
    writer.close()
