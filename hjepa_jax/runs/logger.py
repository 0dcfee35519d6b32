"""What a run says: metrics.jsonl, TensorBoard through CLU's writers, and the progress line."""

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import time
from typing import IO, Any

import numpy as np
from jaxtyping import Float

from hjepa_jax.config.fields import is_a
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.files import replacing
from hjepa_jax.runtime.names import encodable


class RunLogger:
    """Writes one run's metrics.

    Args:
      workdir: the run's directory.
      tensorboard: whether to write TensorBoard events, pictures and texts (imports TensorFlow).
      resume_step: step at which the run goes on; later lines of metrics.jsonl, written by a run
        that was cut off before its next checkpoint, are dropped, and their points in TensorBoard.

    Raises:
      InputError: where TensorBoard is asked for and its packages are missing.
    """

    def __init__(self, workdir: pathlib.Path, *, tensorboard: bool, resume_step: int = 0):
        self._workdir, self.tensorboard, self._resume_step = workdir, tensorboard, resume_step
        if tensorboard and not all(
            map(importlib.util.find_spec, ("clu", "tensorflow", "tensorboard"))
        ):
            rule = "needs the packages clu, tensorflow and tensorboard; False does without"
            raise InputError("log.tensorboard", True, rule)
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        self._path, self._last = path, kept[-1] if kept else {"step": -1}
        self._pending: dict[str, Any] = {}
        self._file = self._rewrite(kept)

    @functools.cached_property
    def _writer(self) -> Any:
        """CLU's writer, or None. Not made before it is used: TensorFlow takes seconds to load."""
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
        """Writes the pending line; values for the step of the last line are added to that line."""
        if not self._pending:
            return
        if self._pending["step"] == self._last["step"]:
            self._pending = {**self._last, **self._pending}
            self._file.close()
            self._file = self._rewrite([*read_metrics(self._path)[:-1], self._pending])
        else:
            self._file.write(json.dumps(self._pending) + "\n")
            _to_disk(self._file)
        self._last, self._pending = self._pending, {}

    def _rewrite(self, lines: list[dict[str, Any]]) -> IO[str]:
        """Puts a whole new file in the place of metrics.jsonl; returns it, open at its end."""
        with replacing(self._path) as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in lines)
        return self._path.open("a", encoding="utf-8")

    def images(self, step: int, images: dict[str, Float[np.ndarray, "B H W 3"]]) -> None:
        """Sends pictures, pixels in [0, 1], to TensorBoard."""
        if self._writer:
            self._writer.write_images(step, images)

    def flush(self) -> None:
        """Waits until TensorBoard has what was sent; a thread encodes pictures and writes."""
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

    def hparams(self, values: dict[str, Any]) -> None:
        """Sends the configuration to TensorBoard's HPARAMS tab."""
        if self._writer:
            self._writer.write_hparams(
                {k: encodable(v) if isinstance(v, str) else v for k, v in values.items()}
            )

    def close(self) -> None:
        """Writes what is pending and flushes everything."""
        self.end_line()
        self._file.close()
        if "_writer" in vars(self) and self._writer:
            self._writer.close()


class SilentLogger(RunLogger):
    """The logger of the processes beside the first: takes everything, writes nothing."""

    def __init__(self):
        self._pending, self.tensorboard = {}, False

    def end_line(self) -> None:
        self._pending = {}

    def close(self) -> None:
        pass


def _to_disk(file: IO[str]) -> None:
    """So that no checkpoint outlives the lines before it, should the power fail."""
    file.flush()
    os.fsync(file.fileno())


def quiet_tensorflow() -> None:
    """Before TensorFlow is imported, by whatever: it talks while loading."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # of oneDNN it talks whatever the level


EVENTS = "events.out.tfevents."  # followed by seconds since 1970, host and process


def _tensorboard_writer(workdir: pathlib.Path, *, resume_step: int | None = None) -> Any:
    """CLU's writer of TensorBoard events.

    Args:
      workdir: where the event file goes.
      resume_step: last step that is kept of what a former process of the run wrote; None if all is
        kept.
    """
    quiet_tensorflow()
    from clu import metric_writers  # imports TensorFlow

    if resume_step is not None:
        _purge_events_after(workdir, resume_step)
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))


def _purge_events_after(workdir: pathlib.Path, step: int) -> None:
    """Tells TensorBoard to forget the events of later steps in the files that are there.

    TensorBoard does so at an event "session started". CLU and tf.summary cannot write one. So a
    small file of its own has it. TensorBoard reads files in the order of their names: this one
    must come after the others and before the one that the run writes next.
    """
    seconds = [file.name.removeprefix(EVENTS)[:10] for file in workdir.glob(f"{EVENTS}*")]
    if not seconds:
        return
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    while max(seconds) == (now := f"{int(time.time()):010}"):
        time.sleep(0.05)  # until the second is over in which the newest was made
    protos: Any = event_pb2  # made at run time
    version = protos.Event(wall_time=time.time(), file_version="brain.Event:2")
    started = protos.SessionLog(status=protos.SessionLog.START)
    start = protos.Event(wall_time=time.time(), step=step + 1, session_log=started)
    # No name of a host begins with "-", which sorts before letters and digits.
    with (workdir / f"{EVENTS}{now}.-resumed").open("wb") as file:
        # The first start that TensorBoard reads counts as the beginning: only the second purges.
        for event in (version, start, start):
            RecordWriter(file).write(event.SerializeToString())


def write_tensorboard_scalars(workdir: pathlib.Path, step: int, values: dict[str, float]) -> None:
    """Adds scalars to the TensorBoard events of a run that is not being trained here."""
    writer = _tensorboard_writer(workdir)
    writer.write_scalars(step, values)
    writer.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that was damaged, or cut off in writing, is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if isinstance(line, dict) and is_a(int, line.get("step")):
                lines.append(line)
    return lines
