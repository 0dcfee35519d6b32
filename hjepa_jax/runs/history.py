"""The metrics.jsonl of a run as series, whatever its length: one pass, bounded memory.

history = read_history(workdir / "metrics.jsonl")
steps, loss = history.series("train/loss")
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

# Of a longer file about so many lines are read, at even distances, and as many with evaluations.
MAX_LINES = 2000


@dataclasses.dataclass(frozen=True)
class History:
    """Lines of a metrics.jsonl, in the order of the file.

    Attributes:
      lines: those read, each a dict of "step" and finite numbers by metric name.
      num_lines: how many the file has.
      num_damaged: how many of those looked at are no line of metrics.
    """

    lines: tuple[dict[str, Any], ...]
    num_lines: int
    num_damaged: int

    @property
    def sampled(self) -> bool:
        """Whether lines were left out, because they are so many."""
        return self.num_lines > len(self.lines) + self.num_damaged

    def names(self, prefix: str) -> list[str]:
        """Metric names that begin with `prefix`, sorted."""
        found = {name for line in self.lines for name in line}
        return sorted(name for name in found if name.startswith(prefix))

    def series(self, name: str) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Steps and values of the lines that have the metric."""
        found = [(line["step"], line[name]) for line in self.lines if name in line]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, np.int64), np.array(values, np.float64)

    def last(self, name: str) -> float | None:
        """Newest value of the metric; None where there is none."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def first(self, name: str) -> float | None:
        """Oldest value of the metric; None where there is none."""
        return next((line[name] for line in self.lines if name in line), None)

    def last_step(self) -> int:
        """Step of the newest line; 0 where there is none."""
        return self.lines[-1]["step"] if self.lines else 0

    def training_seconds(self) -> float:
        """Seconds spent in steps: each line's interval at the rate that it reports."""
        steps, rates = self.series("perf/steps_per_sec")
        return float(np.sum(np.diff(steps, prepend=0)[rates > 0] / rates[rates > 0]))


class _Thinned:
    """Every s-th of the texts added, with s doubled whenever they become too many."""

    def __init__(self):
        self.kept: list[tuple[int, bytes]] = []
        self._stride, self._count = 1, 0

    def add(self, number: int, text: bytes) -> None:
        if self._count % self._stride == 0:
            self.kept.append((number, text))
            if len(self.kept) > MAX_LINES:
                self.kept, self._stride = self.kept[::2], 2 * self._stride
        self._count += 1


def read_history(path: pathlib.Path) -> History:
    """Reads a metrics.jsonl, also one that is being written: a torn last line is left out."""
    every, evaluations, number, text = _Thinned(), _Thinned(), -1, b""
    if path.exists():
        with path.open("rb") as file:
            for number, text in enumerate(file):
                every.add(number, text)
                if b'"eval/' in text:
                    evaluations.add(number, text)
    chosen = dict(every.kept + evaluations.kept)
    if number >= 0:
        chosen[number] = text
    parsed = {i: _parse(chosen[i]) for i in sorted(chosen)}
    torn = number >= 0 and not text.endswith(b"\n") and parsed[number] is None
    if torn:
        del parsed[number]
    lines = tuple(line for line in parsed.values() if line is not None)
    return History(lines, number + 1 - torn, len(parsed) - len(lines))


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl from the first on, one at a time; damaged ones are left out."""
    if path.exists():
        with path.open("rb") as file:
            yield from filter(None, map(_parse, file))


def _parse(text: bytes) -> dict[str, Any] | None:
    """The finite numbers of a line; None where it is no line of metrics."""
    try:
        line = json.loads(text)
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            return None
        return {
            name: value
            for name, value in line.items()
            if type(value) in (int, float) and math.isfinite(value)
        }
    except (ValueError, RecursionError, OverflowError):  # the last: of an integer too long
        return None
