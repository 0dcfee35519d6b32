import contextlib
import importlib.util
import os
import pty
import subprocess
import sys

import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.runs.logger import RunLogger, write_tensorboard
from hjepa_jax.runs.progress import format_duration, summary_box


def test_values_of_one_step_share_a_line(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=False)
    logger.scalars(1, {"a": 1.0})
    logger.scalars(1, {"b": 2.0})
    logger.scalars(2, {"a": 3.0})
    logger.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": 1.0, "b": 2.0},
        {"step": 2, "a": 3.0},
    ]


def test_a_resumed_log_drops_later_steps_and_an_incomplete_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"ste')
    logger = RunLogger(tmp_path, tensorboard=False, resume_step=2)
    logger.scalars(3, {"a": 4})
    logger.close()
    assert [line["a"] for line in read_metrics(path)] == [1, 2, 4]


def test_late_values_of_a_step_join_its_line(tmp_path):
    for values in ({"a": 1}, {"b": 2}):
        logger = RunLogger(tmp_path, tensorboard=False, resume_step=7)
        logger.scalars(7, values)
        logger.end_line()
        logger.scalars(7, {"c": 3})
        logger.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 7, "a": 1, "c": 3, "b": 2}]


def test_tensorflow_is_loaded_on_first_use_only(tmp_path):
    code = """if True:
        import pathlib, sys
        from hjepa_jax.runs.logger import RunLogger
        logger = RunLogger(pathlib.Path(sys.argv[1]), tensorboard=True)
        logger.close()
        assert logger.tensorboard and "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.slow  # it loads TensorFlow
def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path):
    """A run wrote steps 3 and 4 and was killed; its last checkpoint is step 2."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    def write(steps, value, **options):
        logger = RunLogger(tmp_path, tensorboard=True, **options)
        for step in steps:
            logger.scalars(step, {"loss": value})
            logger.histograms(step, {"weights": np.full(4, value)})
            logger.end_line()
        logger.close()

    write(range(1, 5), 1.0)
    write(range(3, 6), 2.0, resume_step=2)
    write(range(5, 7), 3.0, resume_step=4)
    write_tensorboard(tmp_path, 6, {"probe": 1.0}, {"probe_table": "a | b"})
    write([], 4.0, resume_step=1)  # a start without events purges nothing
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    for name in ("loss", "weights"):
        assert [e.step for e in events.Tensors(name)] == [1, 2, 3, 4, 5, 6]
    values = [float(tf_make_ndarray(e.tensor_proto)) for e in events.Tensors("loss")]
    assert values == [1, 1, 2, 2, 3, 3]
    assert [e.step for e in events.Tensors("probe")] == [6]


def tf_make_ndarray(proto):
    from tensorboard.util import tensor_util

    return tensor_util.make_ndarray(proto)


def test_tensorboard_without_its_packages_is_refused(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else found(name)
    )
    with pytest.raises(
        InputError,
        match=r"log.tensorboard=True: needs the packages clu, tensorflow and tensorboard",
    ):
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


# Prints four progress lines and one line that stays, like the loop.
PROGRESS = """
import sys
from hjepa_jax.runs.progress import Progress
progress = Progress(4, 2, every_sec=float(sys.argv[1]))
for step in range(1, 5):
    progress.show(step, loss=1.0, images_per_sec=9.0, steps_per_sec=1.0)
    if step == 2:
        progress.note("k-NN")
progress.end()
"""


def test_a_pipe_gets_a_line_every_n_seconds_and_the_last_one():
    for every_sec, steps in (("0", [1, 2, 3, 4]), ("1000", [1, 4])):
        command = [sys.executable, "-c", PROGRESS, every_sec]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        shown = [f"step {step}/4" in lines for step in range(1, 5)]
        assert [step for step in range(1, 5) if shown[step - 1]] == steps
        assert lines.count("\n") == len(steps) + 1
        assert "\r" not in lines
        assert "\033" not in lines


def test_a_terminal_gets_one_line_that_never_wraps():
    controller, terminal = pty.openpty()
    columns = {**os.environ, "COLUMNS": "40"}
    command = [sys.executable, "-c", PROGRESS, "1000"]
    subprocess.run(command, stdout=terminal, env=columns, check=True)
    os.close(terminal)
    output = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while part := os.read(controller, 100_000):
            output += part
    output = output.decode()
    os.close(controller)
    stays, live = output.split("\r\nk-NN\r\n")
    parts = [*stays.split("\r"), *live.split("\r")]
    assert [part[part.index("step") :][:8] for part in parts if "step" in part] == [
        f"step {step}/4" for step in range(1, 5)
    ]
    assert all(len(part.removesuffix("\033[K")) <= 39 for part in parts)
    assert output.count("\n") == 3, "around what stays, and one at the end"


def test_damaged_lines_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [f'{{"step": {step}}}\n'.encode() for step in (1, 2, 3)]
    path.write_bytes(
        good[0] + b'{"step": \xff\xfe}\n' + good[1] + b'{"loss": 1.0}\n[]\n"x"\n' + good[2]
    )
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    logger = RunLogger(tmp_path, tensorboard=False, resume_step=2)
    logger.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
