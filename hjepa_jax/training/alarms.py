"""Warnings about problems that raise no error: skipped steps, collapsed features, few targets."""

from collections.abc import Callable, Iterable
from typing import Any

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.collapse import PATIENCE, Spread, Untrained, find_limits
from hjepa_jax.evaluation.quality import Verdict, collapse_verdict
from hjepa_jax.method.window import FEATURE_ROWS, LogWindow, collected_features, nonfinite_terms

MIN_TARGETS = 0.5  # smallest number of targets of a level per image without a warning


class Alarms:
    """Reports each problem once, when it begins, or ends the run if the config requires it.

    Args:
      max_nonfinite_steps: number of steps that a run may skip.
      on_collapse: "warn", "stop" or "ignore".
      say: prints a line.
      newest_checkpoint: returns the step of the newest checkpoint, None before the first.
      batch_size: images per step.
    """

    def __init__(
        self,
        *,
        max_nonfinite_steps: int,
        on_collapse: str,
        say: Callable[[str], None],
        newest_checkpoint: Callable[[], int | None],
        batch_size: int = FEATURE_ROWS,
    ):
        self._limit, self._on_collapse = max_nonfinite_steps, on_collapse
        self._say, self._newest_checkpoint = say, newest_checkpoint
        self._num_nonfinite, self._label = 0, "healthy"
        self._num_in_a_row, self._untrained = 0, Untrained(batch_size)
        self._scarce: set[str] = set()

    def remember(self, lines: Iterable[dict[str, Any]]) -> None:
        """Reads the spread of the untrained network from the log of a resumed run."""
        self._untrained.read(lines)

    def check_finite(self, window: LogWindow, step: int) -> None:
        """Reports the steps skipped since the last call.

        Raises:
          InputError: if there are too many ("train.max_nonfinite_steps").
        """
        count = int(window.nonfinite.count)
        if count == self._num_nonfinite:
            return
        self._num_nonfinite = count
        what = (
            f"loss or gradient not finite in {count} of {step} steps, which were left out; "
            f"the newest is step {int(window.nonfinite.newest)}: "
            + ", ".join(nonfinite_terms(window))
        )
        if count > self._limit:
            rule = f"{what}. Lower optim.learning_rate. {self._checkpoint()}"
            raise InputError("train.max_nonfinite_steps", self._limit, rule)
        self._say(f"WARNING: {what}")

    def check_spread(self, verdict: Verdict, step: int) -> None:
        """Reports that the target features have collapsed, or are healthy again.

        A collapse counts after `PATIENCE` calls in a row. The limits depend on the untrained
        network of the run (see `collapse`).

        Raises:
          InputError: if they have collapsed and the config ends the run ("train.on_collapse").
        """
        if self._on_collapse == "ignore":
            return
        spread = Spread(verdict.effective_rank, verdict.relative_std)
        self._untrained.add(step, spread)
        untrained = self._untrained.spread
        limits = find_limits(max_rank=verdict.max_rank, untrained=untrained)
        label = limits.label(spread)
        self._num_in_a_row = 0 if label == "healthy" else self._num_in_a_row + 1
        if label == self._label or 0 < self._num_in_a_row < PATIENCE:
            return
        self._label = label
        assert untrained is not None
        what = (
            f"target features at step {step}: {label}; effective rank "
            f"{verdict.effective_rank:.1f} of {verdict.max_rank} (healthy: at least "
            f"{limits.effective_rank:.1f}; untrained: {untrained.effective_rank:.1f}), relative "
            f"std {verdict.relative_std:.3f} (healthy: at least {limits.relative_std:.2g})"
        )
        if label == "healthy":
            self._say(what)
            return
        what += f", for {self._num_in_a_row} lines of the log"
        if self._on_collapse == "stop":
            raise InputError("train.on_collapse", "stop", f"{what}. {self._checkpoint()}")
        self._say(f"WARNING: {what}")

    def check_targets(self, values: dict[str, float]) -> None:
        """Reports levels that have almost no targets, from the means of a log line."""
        for name, count in values.items():
            if name.startswith("num_targets_level_") and count < MIN_TARGETS:
                if name not in self._scarce:
                    level = name.removeprefix("num_targets_level_")
                    self._say(
                        f"WARNING: level {level} has {count:.2g} targets per image, too few to "
                        "learn from: its cells are hardly ever hidden whole. Raise mask.scale or "
                        "mask.align_level, or lower mask.min_coverage"
                    )
                self._scarce.add(name)

    def _checkpoint(self) -> str:
        step = self._newest_checkpoint()
        return "No checkpoint yet" if step is None else f"The newest checkpoint is step {step}"


def summarize(window: LogWindow, verdict: Verdict | None) -> dict[str, float]:
    """Returns the means of the window, and rank and spread of its features if `verdict` is given.

    A mean is nan if no step of the window was finite.
    """
    values = {name: float(value) for name, value in window.averages.compute().items()}
    if verdict is None:
        return values
    spread = {"effective_rank": verdict.effective_rank, "relative_std": verdict.relative_std}
    return values | spread


def spread(window: LogWindow, *, step: int, batch_size: int) -> Verdict | None:
    """Returns whether the collected features have collapsed; None for fewer than two images.

    Computed on the host, because Apple's plugins have no SVD. It uses at most 512 images, and the
    rank cannot exceed their number.
    """
    features = collected_features(window, step=step, batch_size=batch_size)
    return collapse_verdict(features) if len(features) > 1 else None
