"""Decides whether target features have collapsed, compared with the untrained network.

The features of an untrained network use few directions (an effective rank of 19 of 192 is usual).
So a low rank alone does not prove a collapse: it must also be well below the rank at the start of
the run. Nearly constant features always count as collapsed.

    untrained = untrained_spread(lines, batch_size=64)   # lines of metrics.jsonl
    limits = find_limits(max_rank=192, untrained=untrained)
    limits.label(spread)                                 # "healthy", "partial collapse", "collapse"
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float64

from hjepa_jax.evaluation import quality
from hjepa_jax.method.window import FEATURE_ROWS

Label = Literal["healthy", "partial collapse", "collapse"]

PATIENCE = 3  # consecutive log lines that must show a collapse
UNTRAINED_SHARE = 0.5  # limit as a fraction of the value of the untrained network

# Below these values features always count as collapsed, even if the untrained network is as low.
CERTAIN_RANK_FRACTION = 0.02
CERTAIN_RANK = 1.5  # nearly all variation lies in one direction
CERTAIN_RELATIVE_STD = 0.001


@dataclasses.dataclass(frozen=True)
class Spread:
    """Spread of features: effective rank, and standard deviation relative to their magnitude."""

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
    """Returns the limits for features with a rank of at most `max_rank`.

    Each limit is the conventional threshold of `evaluation.quality`, or half of the value of the
    untrained network if that is lower. It is never below the value of a certain collapse.
    """
    rank, std = quality.MIN_RANK_FRACTION * max_rank, quality.MIN_RELATIVE_STD
    if untrained is None:
        return Limits(rank, std)
    certain_rank = min(rank, max(CERTAIN_RANK_FRACTION * max_rank, CERTAIN_RANK))
    limit = max(min(rank, UNTRAINED_SHARE * untrained.effective_rank), certain_rank)
    if untrained.relative_std is not None:
        std = max(min(std, UNTRAINED_SHARE * untrained.relative_std), CERTAIN_RELATIVE_STD)
    return Limits(limit, std)


def measure_spread(features: Float[np.ndarray, "_ _"]) -> Spread:
    """Returns the spread of a feature matrix."""
    verdict = quality.collapse_verdict(features)
    return Spread(verdict.effective_rank, verdict.relative_std)


def verdict_beside(
    features: Float[np.ndarray, "_ _"],
    untrained: Spread | None,
    *,
    spectrum: Float64[np.ndarray, " _"] | None = None,
) -> quality.Verdict:
    """Returns whether features have collapsed, with the limits of `find_limits`.

    Args:
      features: `[n, D]`.
      untrained: spread of the untrained network on the same images; None = unknown.
      spectrum: `quality.singular_values` of the features, if known.
    """
    found = quality.collapse_verdict(features, spectrum=spectrum)
    limits = find_limits(max_rank=found.max_rank, untrained=untrained)
    return dataclasses.replace(
        found,
        label=limits.label(Spread(found.effective_rank, found.relative_std)),
        min_relative_std=limits.relative_std,
        min_rank_fraction=limits.effective_rank / found.max_rank,
    )


class Untrained:
    """The spread of the untrained network, from the first lines of the log.

    A few images have a low rank. So until a full window of images was logged, the largest values so
    far are used.

    Args:
      batch_size: images per step.
    """

    def __init__(self, batch_size: int):
        self.spread: Spread | None = None
        self._batch_size, self._complete = batch_size, False

    def add(self, step: int, spread: Spread) -> None:
        """Adds the spread that was logged at `step`; steps must ascend."""
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
        """Adds the spreads in lines of metrics.jsonl."""
        for line in lines:
            if self._complete:
                return
            if spread := spread_of(line):
                self.add(line["step"], spread)


def spread_of(line: dict[str, Any]) -> Spread | None:
    """Returns the spread in a line of metrics.jsonl; None if it has none."""
    rank = line.get("train/effective_rank")
    return None if rank is None else Spread(rank, line.get("train/relative_std"))


def untrained_spread(lines: Iterable[dict[str, Any]], *, batch_size: int) -> Spread | None:
    """Returns the spread of the untrained network, from the log of a run; None if unknown."""
    untrained = Untrained(batch_size)
    untrained.read(lines)
    return untrained.spread
