"""Few-shot probe: small tasks of a few classes with one or a few labelled images per class.

    result = fewshot_probe(train_x, test_x, test_y, num_shots=5)
    print(f"{result.top1:.3f} +- {result.interval:.3f}")

References:
  Snell, Swersky, Zemel 2017, "Prototypical networks" (arXiv 1703.05175), eq. 1 and 2: a class is
  the mean of its examples. Wang et al. 2019, "SimpleShot" (arXiv 1911.04623), section 3: features
  are first centred by the mean of the training set and scaled to length 1 (CL2N).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Integer

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.quality import check_features, unit_rows


@dataclasses.dataclass(frozen=True)
class FewshotResult:
    """Accuracy over episodes.

    Attributes:
      top1: mean over episodes, fraction in [0, 1].
      interval: half the width of the 95 % confidence interval of that mean.
      num_episodes: number of episodes.
      num_ways: classes per episode.
      num_queries: classified images per class.
    """

    top1: float
    interval: float
    num_episodes: int
    num_ways: int
    num_queries: int


def fewshot_probe(
    train_x: Float[np.ndarray, "_ _"],
    test_x: Float[np.ndarray, "_ _"],
    test_y: Integer[np.ndarray, " _"],
    *,
    num_shots: int,
    num_ways: int = 5,
    num_queries: int = 15,
    num_episodes: int = 600,
    seed: int = 0,
) -> FewshotResult:
    """Draws episodes from the test set and classifies each query by the nearest prototype.

    There is no hyper-parameter to choose, so only labels inside of an episode are used.

    Args:
      train_x: features `[n, D]`; only their mean is used.
      test_x: features `[num_test, D]` from which episodes are drawn.
      test_y: their classes.
      num_shots: labelled images per class.
      num_ways: classes per episode; all classes if there are fewer.
      num_queries: images per class to classify; fewer if a class has fewer.
      num_episodes: number of episodes.
      seed: seed of the draws; the same seed gives every encoder the same episodes.

    Raises:
      InputError: features are not finite, labels do not match, there are fewer than two classes, or
        a class has no more images than `num_shots` ("--fewshot_shots").
    """
    check_features("train_x", train_x)
    check_features("test_x", test_x)
    if test_y.shape != (len(test_x),):
        raise InputError("test_y", test_y.shape, f"must be one label per row, {len(test_x)}")
    classes = np.unique(test_y)
    if len(classes) < 2:
        raise InputError("test_y", classes.tolist(), "must hold at least two classes")
    num_ways = min(num_ways, len(classes))
    num_queries = min(num_queries, check_shots(test_y, num_shots) - num_shots)

    x = unit_rows(test_x.astype(np.float64) - train_x.mean(axis=0, dtype=np.float64))
    rows_of = {label: np.flatnonzero(test_y == label) for label in classes}
    rng, accuracies = np.random.default_rng(seed), []
    for _ in range(num_episodes):
        ways = rng.choice(classes, size=num_ways, replace=False)
        drawn = np.stack(
            [rng.choice(rows_of[c], size=num_shots + num_queries, replace=False) for c in ways]
        )
        prototypes = x[drawn[:, :num_shots]].mean(axis=1)
        queries = x[drawn[:, num_shots:]]  # [ways, queries, D]
        # Squared distance without the norm of the query, which is the same for all classes.
        distance = np.sum(prototypes**2, axis=1) - 2 * queries @ prototypes.T
        accuracies.append((distance.argmin(axis=-1) == np.arange(num_ways)[:, None]).mean())
    spread = np.std(accuracies, ddof=1) if num_episodes > 1 else 0.0
    return FewshotResult(
        top1=float(np.mean(accuracies)),
        interval=float(1.96 * spread / np.sqrt(num_episodes)),
        num_episodes=num_episodes,
        num_ways=num_ways,
        num_queries=num_queries,
    )


def check_shots(test_y: Integer[np.ndarray, " _"], num_shots: int) -> int:
    """Returns the number of images of the smallest class.

    Raises:
      InputError: no image of that class would remain to classify ("--fewshot_shots").
    """
    smallest = int(np.unique(test_y, return_counts=True)[1].min())
    if num_shots >= smallest:
        rule = f"must be below the {smallest} test images of the smallest class"
        raise InputError("--fewshot_shots", num_shots, rule)
    return smallest
