"""Features, predictions and pictures of a run's newest checkpoint on some training images."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from hjepa_jax.config import Config, build
from hjepa_jax.data.base import Split
from hjepa_jax.evaluation.collapse import measure_spread, verdict_beside
from hjepa_jax.evaluation.features import Features, extract_features, representations
from hjepa_jax.evaluation.knn import knn_predict, nearest_rows
from hjepa_jax.evaluation.labelled import MIN_ROWS, hold_out, why_no_probe
from hjepa_jax.evaluation.quality import Verdict
from hjepa_jax.reporting.snapshot import Snapshot, build_snapshot_fn, fixed_images
from hjepa_jax.runs.load import load_state

BANK_SIZE, NUM_QUERIES = 2000, 500  # numbers of training images: bank, and held-out queries
KNN_K = 20
NUM_NEIGHBOURS, NUM_SHOWN = 6, 6


@dataclasses.dataclass(frozen=True)
class Look:
    """Features and predictions of the newest checkpoint, on some training images.

    Attributes:
      step: step of the checkpoint.
      snapshot: pictures of a few images.
      features: features of the held-out images by name, [Q, D].
      verdict: whether the features of level 0 have collapsed, compared with the untrained network.
      best: name of the features with the best k-NN score on images of the bank. Without classes:
        the summary tokens if there are any, else level 0.
      best_features: these features of the held-out images, [Q, D], for pictures.
      labels, predictions: classes of the held-out images, [Q], and predictions of k-NN on the best
        features. Both are None without labels of at least two classes.
      class_names: indexed by label.
      images: the held-out images, as stored, [Q, H, W, C].
      neighbours: images of the bank with the most similar best features, for the first S held-out
        images, as stored, [S, k, H, W, C].
      same_class: whether a neighbour has the class of its query, bool [S, k]; None without classes.
      bank_size: number of images in the bank.
    """

    step: int
    snapshot: Snapshot
    features: dict[str, Float[np.ndarray, "Q _"]]
    verdict: Verdict
    best: str
    best_features: Float[np.ndarray, "Q _"]
    labels: Int[np.ndarray, " Q"] | None
    predictions: Int[np.ndarray, " Q"] | None
    class_names: tuple[str, ...]
    images: Any
    neighbours: Any
    same_class: Any
    bank_size: int

    @property
    def names(self) -> list[str]:
        """Returns a name for each held-out image: its class, or its number without classes."""
        if self.labels is None:
            return [f"image {i}" for i in range(len(self.images))]
        return [self.class_names[label] for label in self.labels]


def look_at(
    workdir: pathlib.Path, config: Config, model: Any, train: Split, class_names: tuple[str, ...]
) -> Look:
    """Loads the newest checkpoint and applies it to some of the training images."""
    _, state, initial = load_state(workdir)
    snapshot = jax.jit(build_snapshot_fn(config, model))
    embed = jax.jit(build.build_embed_fn(config, model))
    bank, queries = hold_out(len(train.images), num_val=config.eval.num_val)
    bank, queries = (
        rows[:: max(1, math.ceil(len(rows) / count))]
        for rows, count in ((bank, BANK_SIZE), (queries, NUM_QUERIES))
    )

    def features(params: Any, rows: Any) -> dict[str, Any]:
        batch_size = config.eval.batch_size
        return extract_features(embed, params, train.images[rows], batch_size=batch_size)

    bank_x, query_x = (features(state.target_params, rows) for rows in (bank, queries))
    untrained = features(initial.target_params, queries)["level_0"]
    labels = None if why_no_probe(train, class_names) else train.labels
    bank_y = None if labels is None else labels[bank]
    name, best_bank, best_queries = _best_features(bank_x, query_x, bank_y)
    predictions = None
    if bank_y is not None:
        (predictions,) = knn_predict(
            best_bank, bank_y, best_queries, ks=[min(KNN_K, len(bank))],
            num_classes=len(class_names),
        )  # fmt: skip
    shown, k = best_queries[:NUM_SHOWN], min(NUM_NEIGHBOURS, len(bank))
    found = bank[nearest_rows(best_bank, shown, k=k)]
    return Look(
        step=int(state.step),
        snapshot=jax.device_get(
            snapshot(state.params, state.target_params, fixed_images(train.images))
        ),
        features=query_x,
        verdict=verdict_beside(query_x["level_0"], measure_spread(untrained)),
        best=name,
        best_features=best_queries,
        labels=None if labels is None else labels[queries],
        predictions=predictions,
        class_names=class_names,
        images=train.images[queries],
        neighbours=train.images[found],
        same_class=None if labels is None else labels[found] == labels[queries[: len(found)], None],
        bank_size=len(bank),
    )


def _best_features(
    bank_x: Features,
    query_x: dict[str, Float[np.ndarray, "Q _"]],
    bank_y: Int[np.ndarray, " n"] | None,
) -> tuple[str, Float[np.ndarray, "n D"], Float[np.ndarray, "Q D"]]:
    """Returns the features with the best k-NN score: name, values of the bank, of the queries.

    A fifth of the bank is classified by the rest of it, so the queries do not influence the choice.
    Among equal scores the first of `representations` wins. Without classes (None) the summary
    tokens are taken if there are any, else level 0.
    """
    n = len(bank_x["level_0"])
    fit = val = np.arange(n)
    if n >= MIN_ROWS:
        fit, val = hold_out(n, num_val=n)  # a fifth at most

    def score(pool: str, x: Float[np.ndarray, "n D"]) -> float:
        if bank_y is None:
            return float(pool == "summary")
        k, num_classes = min(KNN_K, len(fit)), int(bank_y.max()) + 1
        (found,) = knn_predict(x[fit], bank_y[fit], x[val], ks=[k], num_classes=num_classes)
        return float((found == bank_y[val]).mean())

    in_bank, in_queries = (representations(x) for x in (bank_x, query_x))
    best = max(
        range(len(in_bank)), key=lambda i: score(in_bank[i][0], in_bank[i][2])
    )  # the first of equals
    pool, level, x = in_bank[best]
    levels = "all levels" if level == "all" else f"level {level}"
    names = {"mean": f"{levels}, mean over patches", "summary": "summary tokens"}
    return names.get(pool, f"{levels} and summary tokens"), x, in_queries[best][2]
