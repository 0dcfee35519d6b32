"""The settings of an evaluation."""

import dataclasses

from hjepa_jax.evaluation.features import POOLS, Features, Representation, representations


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Settings of an evaluation, the same for every encoder.

    Attributes:
      protocols: some of `protocols.PROTOCOLS`.
      levels: levels to evaluate; None = all.
      pools: some of `features.POOLS`.
      num_val: training images held out to choose hyper-parameters; at most a fifth of all.
      seed: seed of the hold-out, of low-shot draws and of episodes.
      batch_size: images per call of the encoder.
      lowshot_labels: labels per class, or fractions; None = the entries of `lowshot.DEFAULT_SHOTS`
        for which the smallest class has enough images.
      fewshot_shots: labelled images per class of an episode.
    """

    protocols: tuple[str, ...] = ("linear", "knn")
    levels: tuple[int, ...] | None = None
    pools: tuple[str, ...] = POOLS
    num_val: int = 5000
    seed: int = 0
    batch_size: int = 256
    lowshot_labels: tuple[int | float, ...] | None = None
    fewshot_shots: tuple[int, ...] = (1, 5)

    def representations(self, features: Features) -> list[Representation]:
        """Returns the representations to evaluate."""
        return representations(features, levels=self.levels, pools=self.pools)
