"""What a run prints: the progress line, durations, and the box at the end."""

import math
import shutil
import sys
import time
from typing import Any


class Progress:
    """One live line on a terminal; a line every few seconds in a file or a pipe.

    Args:
      num_steps: steps of the whole run.
      steps_per_epoch: steps of an epoch.
      every_sec: seconds between two lines in a file. The lines of the first and the last step are
        always written.
    """

    def __init__(self, num_steps: int, steps_per_epoch: int, *, every_sec: float = 5.0):
        self.num_steps, self.steps_per_epoch = num_steps, steps_per_epoch
        self._live = sys.stdout.isatty()
        self._every_sec, self._due = every_sec, -math.inf

    def show(self, step: int, *, loss: float, images_per_sec: float, steps_per_sec: float) -> None:
        """Shows step, loss, speed, and the time left at that speed."""
        left = (self.num_steps - step) / max(steps_per_sec, 1e-9)
        line = (
            f"epoch {step / self.steps_per_epoch:.2f}/{self.num_steps / self.steps_per_epoch:.3g}  "
            f"step {step}/{self.num_steps}  loss {loss:.4f}  {images_per_sec:.0f} images/s  "
            f"{format_duration(left)} left"
        )
        if self._live:  # cut to the width: a line that wraps cannot be overwritten
            width = shutil.get_terminal_size().columns
            print(f"\r{line[: width - 1]}\033[K", end="", flush=True)
        elif step == self.num_steps or time.monotonic() >= self._due:
            print(line, flush=True)
            self._due = time.monotonic() + self._every_sec

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        print(f"\r{text}\033[K" if self._live else text, flush=True)

    def end(self) -> None:
        """Ends the live line and leaves it on the terminal."""
        if self._live:
            print(flush=True)


def format_duration(seconds: float) -> str:
    """Returns 75 as "1:15" and 3700 as "1:01:40"."""
    minutes, sec = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{sec:02d}" if hours else f"{minutes}:{sec:02d}"


class StepTimer:
    """Measures rates between log lines, without pauses (probes, checkpoints, compiling)."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Starts a new interval."""
        self._start = time.perf_counter()
        self._steps, self._data_wait, self._paused = 0, 0.0, 0.0

    def add_steps(self, num_steps: int, data_wait: float) -> None:
        """Counts steps, and the seconds that the device waited for their data."""
        self._steps += num_steps
        self._data_wait += data_wait

    def add_pause(self, seconds: float) -> None:
        """Subtracts `seconds` from the interval."""
        self._paused += seconds

    def rates(self, batch_size: int) -> dict[str, float]:
        """Returns the perf/* metrics of the interval."""
        elapsed = max(time.perf_counter() - self._start - self._paused, 1e-9)
        return {
            "perf/steps_per_sec": self._steps / elapsed,
            "perf/images_per_sec": self._steps * batch_size / elapsed,
            "perf/data_wait_fraction": min(self._data_wait / elapsed, 1.0),
        }


def peak_memory_bytes(device: Any) -> int:
    """Returns the peak memory of the device; on CPU, of the process; 0 if it is not counted."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def summary_box(title: str, lines: dict[str, str]) -> str:
    """Returns a frame of plain characters around a title and named lines."""
    width = max(map(len, lines), default=0)
    rows = [title, *(f"{name:<{width}}  {text}" for name, text in lines.items())]
    side = max(map(len, rows))
    rule = "+" + "-" * (side + 2) + "+"
    return "\n".join([rule, *(f"| {row:<{side}} |" for row in rows), rule])
