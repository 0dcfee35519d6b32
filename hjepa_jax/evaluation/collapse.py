"""When target features count as collapsed: beside the untrained network, and for some time.

The features of an untrained network already use few directions (an effective rank of 19 of 192 is
usual). So a low rank alone is no sign of collapse: it must also be well below the rank at the
start of the run. Nearly constant features count in any case.

    untrained = untrained_spread(lines, batch_size=64)   # lines of metrics.jsonl
    limits = find_limits(max_rank=192, untrained=untrained)
    limits.label(spread)                                 # "healthy", "partial collapse", "collapse"
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from hjepa_jax.evaluation import quality
from hjepa_jax.method.window import FEATURE_ROWS

Label = Literal["healthy", "partial collapse", "collapse"]

PATIENCE = 3  # log lines in a row that must show it
UNTRAINED_SHARE = 0.5  # of the untrained network's value: below it, features have got worse

# Below these, features count as collapsed whatever the untrained network does.
CERTAIN_RANK_FRACTION = 0.02
CERTAIN_RANK = 1.5  # nearly all variation lies in one direction
CERTAIN_RELATIVE_STD = 0.001


@dataclasses.dataclass(frozen=True)
class Spread:
    """How far features spread: effective rank, and std relative to their size."""

    effective_rank: float
    relative_std: float | None


@dataclasses.dataclass(frozen=True)
class Limits:
    """Values below which features count as collapsed."""

    effective_rank: float
    relative_std: float

    def label(self, spread: Spread) -> Label:
        """Returns "collapse" (to a point), "partial collapse" (to few directions) or "healthy"."""
        if spread.relative_std is not None and spread.relative_std < self.relative_std:
            return "collapse"
        return "partial collapse" if spread.effective_rank < self.effective_rank else "healthy"


def find_limits(*, max_rank: int, untrained: Spread | None) -> Limits:
    """Returns the limits for features whose rank can be at most `max_rank`.

    They are the conventional thresholds of `evaluation.quality`. If half of what the untrained
    network has is less than a threshold, they are that half. But they are never below the values
    that are certain to be a collapse.
    """
    rank, std = quality.MIN_RANK_FRACTION * max_rank, quality.MIN_RELATIVE_STD
    if untrained is None:
        return Limits(rank, std)
    certain_rank = min(rank, max(CERTAIN_RANK_FRACTION * max_rank, CERTAIN_RANK))
    limit = max(min(rank, UNTRAINED_SHARE * untrained.effective_rank), certain_rank)
    if untrained.relative_std is not None:
        std = max(min(std, UNTRAINED_SHARE * untrained.relative_std), CERTAIN_RELATIVE_STD)
    return Limits(limit, std)


class Untrained:
    """What the features of the untrained network are like, from the first lines of the log.

    The rank of few rows is low. So as long as fewer images than a full window have been seen, the
    largest values count.

    Args:
      batch_size: images per step.
    """

    def __init__(self, batch_size: int):
        self.spread: Spread | None = None
        self._batch_size, self._complete = batch_size, False

    def add(self, step: int, spread: Spread) -> None:
        """Takes the spread that was logged at `step`, in the order of steps."""
        if self._complete:
            return
        old = self.spread
        if old is not None:
            stds = [s for s in (old.relative_std, spread.relative_std) if s is not None]
            rank = max(old.effective_rank, spread.effective_rank)
            spread = Spread(rank, max(stds, default=None))
        self.spread = spread
        self._complete = step * self._batch_size >= FEATURE_ROWS

    def read(self, lines: Iterable[dict[str, Any]]) -> None:
        """Takes what lines of metrics.jsonl say."""
        for line in lines:
            if self._complete:
                return
            if spread := spread_of(line):
                self.add(line["step"], spread)


def spread_of(line: dict[str, Any]) -> Spread | None:
    """What a line of metrics.jsonl says of the features; None if it does not."""
    rank = line.get("train/effective_rank")
    return None if rank is None else Spread(rank, line.get("train/relative_std"))


def untrained_spread(lines: Iterable[dict[str, Any]], *, batch_size: int) -> Spread | None:
    """The spread of the untrained network, from the lines of a run; None if no line says."""
    untrained = Untrained(batch_size)
    untrained.read(lines)
    return untrained.spread
