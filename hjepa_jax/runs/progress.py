"""Console output of a run: the table at the start, the progress line, and the box at the end."""

import math
import shutil
import sys
import time
from typing import Any

WIDTH = 80  # characters of a line that is not on a terminal


class LiveLine:
    """One line that changes on a terminal; a line every few seconds in a file or a pipe.

    Args:
      every_sec: seconds between two lines in a file.
    """

    def __init__(self, every_sec: float = 5.0):
        self.live = sys.stdout.isatty()
        self._every_sec, self._due, self._open = every_sec, -math.inf, False

    def is_due(self) -> bool:
        """Returns whether a file would get a line now."""
        return time.monotonic() >= self._due

    def update(self, text: str, *, short: str = "", always: bool = False) -> None:
        """Shows a text, or `short` if the text is too wide: a wrapped line cannot be redrawn.

        With `always`, the text is written to a file even if no line is due.
        """
        width = shutil.get_terminal_size((WIDTH, 24)).columns if self.live else WIDTH
        line = short if short and len(text) >= width else text
        if self.live:
            print(f"\r{line[: width - 1]}\033[K", end="", flush=True)
            self._open = True
        elif always or self.is_due():
            print(line, flush=True)
        else:
            return
        self._due = time.monotonic() + self._every_sec

    def note(self, text: str) -> None:
        """Prints a line below the live line, which stays."""
        self.end()
        print(text, flush=True)

    def end(self) -> None:
        """Ends the live line and leaves it on the terminal."""
        if self._open:
            print(flush=True)
        self._open = False

    def clear(self) -> None:
        """Removes the live line from the terminal."""
        if self._open:
            print("\r\033[K", end="", flush=True)
        self._open = False


class Progress(LiveLine):
    """Step, loss, effective rank, newest k-NN score, speed and time left of a run.

    Args:
      num_steps: steps of the whole run.
      steps_per_epoch: steps of an epoch.
      every_sec: seconds between two lines in a file. The line of the last step is always written.
    """

    def __init__(self, num_steps: int, steps_per_epoch: int, *, every_sec: float = 5.0):
        super().__init__(every_sec)
        self.num_steps, self.steps_per_epoch = num_steps, steps_per_epoch
        self.rank, self.knn = math.nan, math.nan  # newest effective rank, and k-NN score in [0, 1]

    def show(self, step: int, *, loss: float, images_per_sec: float, steps_per_sec: float) -> None:
        """Shows the state at a step, and the time left at this speed."""
        left = (self.num_steps - step) / max(steps_per_sec, 1e-9)
        epochs = f"{step / self.steps_per_epoch:.2f}/{self.num_steps / self.steps_per_epoch:.3g}"
        parts = [
            f"step {step}/{self.num_steps}",
            f"loss {loss:.4f}",
            *([] if math.isnan(self.rank) else [f"rank {self.rank:.1f}"]),
            *([] if math.isnan(self.knn) else [f"k-NN {100 * self.knn:.1f} %"]),
            f"{images_per_sec:.0f} images/s",
            f"{format_duration(left)} left",
        ]
        line = "  ".join(parts)
        self.update(f"epoch {epochs}  {line}", short=line, always=step == self.num_steps)


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
    """Returns the peak memory of the device, on CPU of the process, in bytes; 0 if unknown."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def sizes_table(sizes: dict[str, Any]) -> dict[str, str]:
    """Returns the result of `runs.run.sizes` as text, by heading."""
    s = sizes
    epochs = s["num_steps"] / s["steps_per_epoch"]
    memory = f"{(s['state_bytes'] + s['images_bytes']) / 2**20:,.0f} MiB for state and images; "
    memory += "activations come on top"
    if s.get("step_bytes"):
        memory = f"{s['step_bytes'] / 2**20:,.0f} MiB on each device, by XLA's estimate"
    return {
        "length": f"{s['num_steps']:,} updates of {s['images_per_update']:,} images, "
        f"{epochs:.3g} epochs",
        "parameters": f"{s['params_trainable']:,} trained, {s['params_total']:,} with the EMA",
        "image": f"{s['num_patches']} patches, at most {s['num_context']} of them visible, "
        f"{s['num_levels']} levels",
        "memory": memory,
    }


def format_table(lines: dict[str, str]) -> str:
    """Returns lines with their headings in a column."""
    width = max(map(len, lines), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def summary_box(title: str, lines: dict[str, str]) -> str:
    """Returns a frame of plain characters around a title and named lines."""
    rows = [title, *format_table(lines).splitlines()]
    side = max(map(len, rows))
    rule = "+" + "-" * (side + 2) + "+"
    return "\n".join([rule, *(f"| {row:<{side}} |" for row in rows), rule])
