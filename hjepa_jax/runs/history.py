"""Reads the metrics.jsonl of a run.

    history = read_history(workdir / "metrics.jsonl")
    steps, loss = history.series("train/loss")

A run only appends to the file. Several lines may have the same step: readers merge them into one.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

# If a file has more lines, about this many evenly spaced lines and all evaluations are read.
MAX_LINES = 2000

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class History:
    """The lines of a metrics.jsonl, in the order of the file.

    Attributes:
      lines: dicts of "step" and finite numbers by metric name; one for each step.
      num_lines: number of lines in the file.
      num_damaged: number of the lines read that hold no metrics.
      sampled: whether lines were skipped because the file is long.
    """

    lines: tuple[Line, ...]
    num_lines: int
    num_damaged: int
    sampled: bool

    def names(self, prefix: str) -> list[str]:
        """Returns the metric names that begin with `prefix`, sorted."""
        found = {name for line in self.lines for name in line}
        return sorted(name for name in found if name.startswith(prefix))

    def series(self, name: str) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Returns steps and values of the lines that have the metric."""
        found = [(line["step"], line[name]) for line in self.lines if name in line]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, np.int64), np.array(values, np.float64)

    def last(self, name: str) -> float | None:
        """Returns the newest value of the metric; None if there is none."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def first(self, name: str) -> float | None:
        """Returns the oldest value of the metric; None if there is none."""
        return next((line[name] for line in self.lines if name in line), None)

    def last_step(self) -> int:
        """Returns the step of the newest line; 0 if there is none."""
        return self.lines[-1]["step"] if self.lines else 0

    def training_seconds(self) -> float:
        """Returns the seconds spent in steps, computed from the steps and the rate of each line."""
        steps, rates = self.series("perf/steps_per_sec")
        return float(np.sum(np.diff(steps, prepend=0)[rates > 0] / rates[rates > 0]))


def read_history(path: pathlib.Path) -> History:
    """Reads a metrics.jsonl of any length; skips an incomplete last line."""
    if not path.exists():
        return History((), 0, 0, sampled=False)
    with path.open("rb") as file:
        num_lines = sum(1 for _ in file)
        stride = max(1, -(-num_lines // MAX_LINES))
        file.seek(0)
        chosen = [
            text
            for i, text in enumerate(file)
            if i % stride == 0 or i == num_lines - 1 or b'"eval/' in text
        ]
    parsed = [_parse(text) for text in chosen]
    if parsed and parsed[-1] is None and not chosen[-1].endswith(b"\n"):
        num_lines -= 1
        parsed.pop()
    good = [line for line in parsed if line is not None]
    return History(
        lines=tuple(_merged(good)),
        num_lines=num_lines,
        num_damaged=len(parsed) - len(good),
        sampled=num_lines > len(parsed),
    )


def read_lines(path: pathlib.Path) -> Iterator[Line]:
    """Yields the lines of a metrics.jsonl, one for each step; skips damaged lines."""
    if path.exists():
        with path.open("rb") as file:
            yield from _merged(filter(None, map(_parse, file)))


def read_metrics(path: pathlib.Path) -> list[Line]:
    """Returns the lines of a metrics.jsonl, one for each step, without damaged lines."""
    return [*read_lines(path)]


def end_of_step(path: pathlib.Path, step: int) -> int:
    """Returns the bytes of a metrics.jsonl up to its last good line at or before `step`."""
    position = end = 0
    with path.open("rb") as file:
        for text in file:
            position += len(text)
            line = _parse(text)
            if line and line["step"] <= step and text.endswith(b"\n"):
                end = position
    return end


def _merged(lines: Iterable[Line]) -> Iterator[Line]:
    """Yields one line for each step."""
    for _, same_step in itertools.groupby(lines, lambda line: line["step"]):
        yield {name: value for line in same_step for name, value in line.items()}


def _parse(text: bytes) -> Line | None:
    """Returns the finite numbers of a line; None if it holds no metrics."""
    try:
        line = json.loads(text)
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            return None
        return {
            name: value
            for name, value in line.items()
            if type(value) in (int, float) and math.isfinite(value)
        }
    except (ValueError, RecursionError, OverflowError):  # OverflowError: a very long integer
        return None
