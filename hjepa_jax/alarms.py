"""What a run says when it goes wrong without failing: steps left out, features that collapse."""

from collections.abc import Callable

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.quality import Verdict
from hjepa_jax.metrics import LogWindow, nonfinite_terms

MIN_TARGETS = 0.5  # of a level, per image


class Alarms:
    """Says each thing once, when it begins, and ends the run where the user wants that.

    Args:
      max_nonfinite_steps: how many steps of a run may be left out.
      on_collapse: "warn", "stop" or "ignore".
      say: prints a line.
      newest_checkpoint: step of the newest checkpoint, None before the first.
    """

    def __init__(
        self,
        *,
        max_nonfinite_steps: int,
        on_collapse: str,
        say: Callable[[str], None],
        newest_checkpoint: Callable[[], int | None],
    ):
        self._limit, self._on_collapse = max_nonfinite_steps, on_collapse
        self._say, self._newest_checkpoint = say, newest_checkpoint
        self._num_nonfinite, self._label = 0, "healthy"
        self._scarce: set[str] = set()

    def check_finite(self, window: LogWindow, step: int) -> None:
        """Reports the steps left out since the last look.

        Raises:
          InputError: when they are too many ("train.max_nonfinite_steps").
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

        Raises:
          InputError: when they have and that is to end the run ("train.on_collapse").
        """
        if self._on_collapse == "ignore" or verdict.label == self._label:
            return
        self._label = verdict.label
        what = (
            f"target features at step {step}: {verdict.label}; effective rank "
            f"{verdict.effective_rank:.1f} of {verdict.max_rank} (healthy: at least "
            f"{verdict.min_rank_fraction * verdict.max_rank:.1f}), relative std "
            f"{verdict.relative_std:.3f} (healthy: at least {verdict.min_relative_std})"
        )
        if verdict.label != "healthy" and self._on_collapse == "stop":
            raise InputError("train.on_collapse", "stop", f"{what}. {self._checkpoint()}")
        self._say(what if verdict.label == "healthy" else f"WARNING: {what}")

    def check_targets(self, values: dict[str, float]) -> None:
        """Reports levels that are hardly ever predicted, from the means of a line of the log."""
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
