"""Finds the best checkpoint: the one with the highest k-NN score of its protocol."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from hjepa_jax.config.fields import is_a

BEST_METRIC = "eval/knn_top1"


@dataclasses.dataclass(frozen=True)
class Score:
    """The k-NN score of a checkpoint.

    Attributes:
      value: top-1 accuracy on held-out images, in [0, 1]; the highest over the kinds of features.
      metric: name of that accuracy in the log.
      protocol: number of held-out images, number of images that they were compared with, and
        `eval.data`. Scores of different protocols are not comparable.
    """

    value: float
    metric: str
    protocol: tuple[Any, ...]


def read_score(meta: dict[str, Any]) -> Score | None:
    """Returns the score in the meta of a checkpoint; None if it was not evaluated."""
    found = [
        (value, name)
        for name, value in meta["scores"].items()
        if name.startswith(BEST_METRIC) and is_a(float, value)
    ]
    evaluation = meta["config"]["eval"]
    protocol = (evaluation["num_val"], evaluation["knn_bank_size"], evaluation.get("data"))
    return Score(*max(found), protocol) if found else None


class KeepBest:
    """Tells Orbax to keep the best checkpoint of each protocol (a `PreservationPolicy`).

    Orbax's own policy uses metrics that are lost when the process ends.

    Attributes:
      scores: score of each step that has been read; None for a step without one.
    """

    def __init__(self):
        self.scores: dict[int, Score | None] = {}

    def best_step(self, steps: Iterable[int]) -> int | None:
        """Returns the best step by the protocol of the newest score; None if no step has a score.

        Among equal scores the newest step wins.
        """
        best = self._best_steps(steps)
        return best[-1] if best else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether it is the best of its protocol."""
        best = self._best_steps(info.step for info in checkpoints)
        return [info.step in best for info in checkpoints]

    def _best_steps(self, steps: Iterable[int]) -> list[int]:
        """Returns the best step of each protocol; the protocol of the newest score comes last."""
        best: dict[tuple[Any, ...], tuple[float, int]] = {}
        for step in sorted(steps):
            if score := self.scores.get(step):
                candidates = [(score.value, step)]
                if score.protocol in best:
                    candidates.append(best.pop(score.protocol))
                best[score.protocol] = max(candidates)
        return [step for _, step in best.values()]
