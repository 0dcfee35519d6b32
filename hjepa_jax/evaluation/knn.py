"""k-nearest-neighbour probe: weighted votes of the most similar training images.

The search is exact, and one pass over the data serves every k. It runs in NumPy on the host: not
every accelerator sorts correctly, and NumPy is fast enough.

>>> rng = np.random.default_rng(0)
>>> y = np.arange(300) % 3
>>> x = np.eye(3, dtype=np.float32)[y] + rng.normal(0, 0.2, (300, 3)).astype(np.float32)
>>> result = knn_probe(x[:200], y[:200], x[200:], y[200:], num_classes=3, ks=(1, 5, 20))
>>> result.top1 > 0.95
True

References:
  Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination"
  (arXiv 1805.01978), section 3.4: cosine similarity, votes weighted by exp(similarity / 0.07).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int32, Integer

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import progress
from hjepa_jax.evaluation.labelled import ProbeResult, check_splits, choose, edge_note, hold_out
from hjepa_jax.evaluation.quality import unit_rows

DEFAULT_KS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07


@dataclasses.dataclass(frozen=True)
class KnnResult(ProbeResult):
    """Outcome of the k-NN probe.

    `chosen_k` has the best held-out score; among equal scores `labelled.choose` decides. The
    largest k counts as an end of the grid only if there are rows for a larger k.
    """

    chosen_k: int


def knn_probe(
    train_x: Float[np.ndarray, "_ _"],
    train_y: Integer[np.ndarray, " _"],
    test_x: Float[np.ndarray, "_ _"],
    test_y: Integer[np.ndarray, " _"],
    *,
    num_classes: int,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = TEMPERATURE,
    num_val: int = 5000,
    seed: int = 0,
    block_size: int = 512,
    what: str = "",
) -> KnnResult:
    """Chooses k on held-out training rows, then scores the test once with all training rows.

    The arguments are those of `linear_probe`, and `temperature` and `block_size` of `knn_predict`.
    `ks` are the numbers of neighbours to choose from, at most the number of rows that are not held
    out.

    Raises:
      InputError: see `linear_probe`, or a k is too large ("ks").
    """
    check_splits(train_x, train_y, test_x, test_y, num_classes=num_classes)
    options = {"num_classes": num_classes, "temperature": temperature, "block_size": block_size}
    options["what"] = what

    fit, val = hold_out(len(train_x), num_val=num_val, seed=seed)
    predicted = knn_predict(train_x[fit], train_y[fit], train_x[val], ks=ks, **options)
    val_top1 = (predicted == train_y[None, val]).mean(axis=1).tolist()
    order = np.argsort(ks)
    best, at_edge = choose(
        [val_top1[i] for i in order], open_start=min(ks) > 1, open_end=max(ks) < len(fit)
    )
    chosen_k = ks[order[best]]

    (predictions,) = knn_predict(train_x, train_y, test_x, ks=[chosen_k], **options)
    return KnnResult(
        top1=float((predictions == test_y).mean()),
        val_top1=tuple(val_top1),
        test_predictions=predictions,
        at_edge=(edge_note("k", chosen_k, ks),) if at_edge else (),
        chosen_k=chosen_k,
    )


def knn_predict(
    bank_x: Float[np.ndarray, "n D"],
    bank_y: Integer[np.ndarray, " n"],
    query_x: Float[np.ndarray, "Q D"],
    *,
    ks: Sequence[int],
    num_classes: int,
    temperature: float = TEMPERATURE,
    block_size: int = 512,
    what: str = "",
) -> Int32[np.ndarray, "num_ks Q"]:
    """Classifies each query by the weighted vote of its k most similar bank rows, for every k.

    A neighbour of cosine similarity s votes with weight exp(s / temperature). Ties: among equally
    similar rows (in float32) the earlier row of the bank counts, among equal votes the lower class
    wins. A row of zeros has similarity 0 to everything.

    Args:
      bank_x: features of the labelled rows.
      bank_y: their classes in [0, num_classes).
      query_x: features to classify.
      ks: numbers of neighbours in [1, n].
      num_classes: number of classes.
      temperature: > 0; smaller values weigh the nearest neighbours more.
      block_size: queries per block; memory is about 10 * block_size * n bytes.
      what: title of the progress bar; empty = none.

    Returns:
      Predicted classes, one row per k in the given order.

    Raises:
      InputError: a k is out of range, or `ks` is empty ("ks").
    """
    n = len(bank_x)
    if not ks or min(ks) < 1 or max(ks) > n:
        raise InputError("ks", tuple(ks), f"must lie in [1, {n}], the rows in the bank")
    bank = unit_rows(bank_x.astype(np.float32))
    predictions = np.empty((len(ks), len(query_x)), np.int32)
    starts = range(0, len(query_x), block_size)
    for start in progress(what, len(starts), unit=" blocks", iterable=starts):
        block = slice(start, start + block_size)
        similarity = unit_rows(query_x[block].astype(np.float32)) @ bank.T
        neighbours = largest_columns(similarity, max(ks))
        similarity = np.take_along_axis(similarity, neighbours, axis=1).astype(np.float64)
        # Relative to the nearest neighbour: the same vote, without overflow.
        weights = np.exp((similarity - similarity[:, :1]) / temperature)

        # The votes for k are the votes for the next smaller k, plus the ranks between the two.
        q = len(neighbours)
        ballot = np.arange(q)[:, None] * num_classes + bank_y[neighbours]
        votes, counted = np.zeros((q, num_classes)), 0
        for row in np.argsort(ks):
            ranks = slice(counted, ks[row])
            new = np.bincount(ballot[:, ranks].ravel(), weights[:, ranks].ravel(), votes.size)
            votes, counted = votes + new.reshape(votes.shape), ks[row]
            predictions[row, block] = votes.argmax(axis=1)
    return predictions


def nearest_rows(
    bank_x: Float[np.ndarray, "n D"], query_x: Float[np.ndarray, "q D"], *, k: int
) -> Integer[np.ndarray, "q k"]:
    """Returns the k bank rows with the largest cosine similarity to each query, largest first."""
    bank, queries = (unit_rows(x.astype(np.float32)) for x in (bank_x, query_x))
    return largest_columns(queries @ bank.T, k)


def largest_columns(similarity: Float32[np.ndarray, "q n"], k: int) -> Integer[np.ndarray, "q k"]:
    """Returns the columns of the k largest values, in order; ties go to lower columns."""
    top = np.argpartition(similarity, -k, axis=1)[:, -k:]
    smallest = np.take_along_axis(similarity, top, axis=1).min(axis=1, keepdims=True)
    # If several columns have the k-th value, argpartition takes arbitrary ones of them.
    for row in np.flatnonzero(np.sum(similarity >= smallest, axis=1) > k):
        top[row] = np.argsort(-similarity[row], kind="stable")[:k]
    top.sort(axis=1)
    order = np.argsort(-np.take_along_axis(similarity, top, axis=1), axis=1, kind="stable")
    return np.take_along_axis(top, order, axis=1)
