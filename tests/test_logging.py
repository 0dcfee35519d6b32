import contextlib
import importlib.util
import os
import pty
import sys

import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.runs.logger import RunLogger, write_tensorboard
from hjepa_jax.runs.progress import Progress, format_duration, summary_box
from tests import processes


def write(path, values, **options):
    """Logs (step, values) pairs; returns all lines of the file."""
    logger = RunLogger(path, tensorboard=False, **options)
    for step, metrics in values:
        logger.scalars(step, metrics)
    logger.close()
    return read_metrics(path / "metrics.jsonl")


def test_values_of_one_step_share_a_line(tmp_path):
    lines = write(tmp_path, [(1, {"a": 1.0}), (1, {"b": 2.0}), (2, {"a": 3.0})])
    assert lines == [{"step": 1, "a": 1.0, "b": 2.0}, {"step": 2, "a": 3.0}]


def test_a_resumed_log_drops_later_steps_and_an_incomplete_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"ste')
    lines = write(tmp_path, [(3, {"a": 4})], resume_step=2)
    assert [line["a"] for line in lines] == [1, 2, 4]


def make_logger(path):
    logger = RunLogger(path, tensorboard=True)
    logger.close()
    assert logger.tensorboard
    assert "tensorflow" not in sys.modules


def test_tensorflow_is_loaded_on_first_use_only(tmp_path):
    processes.call(make_logger, tmp_path)


@pytest.mark.slow  # it loads TensorFlow
def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path):
    """A run wrote steps 3 and 4 and was killed; its last checkpoint is step 2."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    def write_steps(steps, value, **options):
        logger = RunLogger(tmp_path, tensorboard=True, **options)
        for step in steps:
            logger.scalars(step, {"loss": value})
            logger.histograms(step, {"weights": np.full(4, value)})
            logger.end_line()
        logger.close()

    write_steps(range(1, 5), 1.0)
    write_steps(range(3, 6), 2.0, resume_step=2)
    write_steps(range(5, 7), 3.0, resume_step=4)
    write_tensorboard(tmp_path, 6, {"probe": 1.0}, {"probe_table": "a | b"})
    write_steps([], 4.0, resume_step=1)  # a start without events purges nothing
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    for name in ("loss", "weights"):
        assert [e.step for e in events.Tensors(name)] == [1, 2, 3, 4, 5, 6]
    values = [float(tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors("loss")]
    assert values == [1, 1, 2, 2, 3, 3]
    assert [e.step for e in events.Tensors("probe")] == [6]


def test_tensorboard_without_its_packages_is_refused(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else found(name)
    )
    rule = r"log.tensorboard=True: needs the packages clu, tensorflow and tensorboard"
    with pytest.raises(InputError, match=rule):
        RunLogger(tmp_path, tensorboard=True)


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (75, "1:15"), (3700, "1:01:40"), (59.6, "1:00")]
)
def test_durations_are_formatted(seconds, text):
    assert format_duration(seconds) == text


def test_the_summary_box_is_a_closed_frame():
    box = summary_box("done", {"report": "runs/a/report.html", "look": "tensorboard"}).splitlines()
    assert len({len(line) for line in box}) == 1
    assert box[0] == box[-1] == "+" + "-" * (len(box[0]) - 2) + "+"
    assert "report  runs/a/report.html" in box[2]


def show_progress(every_sec):
    """Prints four progress lines and one line that stays, as the training loop does."""
    progress = Progress(4, 2, every_sec=every_sec)
    for step in range(1, 5):
        progress.show(step, loss=1.0, images_per_sec=9.0, steps_per_sec=1.0)
        if step == 2:
            progress.note("k-NN")
    progress.end()


@pytest.mark.parametrize(("every_sec", "steps"), [(0.0, [1, 2, 3, 4]), (1000.0, [1, 4])])
def test_a_pipe_gets_a_line_every_n_seconds_and_the_last_one(capfd, every_sec, steps):
    show_progress(every_sec)
    lines = capfd.readouterr().out
    assert [step for step in range(1, 5) if f"step {step}/4" in lines] == steps
    assert lines.count("\n") == len(steps) + 1
    assert "\r" not in lines
    assert "\033" not in lines


def test_a_terminal_gets_one_line_that_never_wraps(monkeypatch):
    controller, terminal = pty.openpty()
    monkeypatch.setenv("COLUMNS", "40")
    with os.fdopen(terminal, "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        show_progress(1000.0)
    output = b""
    with contextlib.suppress(OSError):  # reading fails at the end of the terminal
        while part := os.read(controller, 100_000):
            output += part
    output = output.decode()
    os.close(controller)
    stays, live = output.split("\r\nk-NN\r\n")
    parts = [*stays.split("\r"), *live.split("\r")]
    shown = [part[part.index("step") :][:8] for part in parts if "step" in part]
    assert shown == [f"step {step}/4" for step in range(1, 5)]
    assert all(len(part.removesuffix("\033[K")) <= 39 for part in parts)
    assert output.count("\n") == 3, "two around the line that stays, and one at the end"


def test_damaged_lines_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [f'{{"step": {step}}}\n'.encode() for step in (1, 2, 3)]
    path.write_bytes(
        good[0] + b'{"step": \xff\xfe}\n' + good[1] + b'{"loss": 1.0}\n[]\n"x"\n' + good[2]
    )
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert [line["step"] for line in write(tmp_path, [], resume_step=2)] == [1, 2]
