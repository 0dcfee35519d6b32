"""The evaluation protocol: which encoders, which features, which probes.

Every probe of the trained encoder is repeated for an untrained encoder and for the raw pixels.
Without these two baselines a score means little.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from hjepa_jax.data.base import Split
from hjepa_jax.data.fingerprint import fingerprint
from hjepa_jax.data.rows import Rows
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.extraction import Extractor
from hjepa_jax.evaluation.feature_cache import FeatureCache
from hjepa_jax.evaluation.features import EmbedFn, embed_pixels
from hjepa_jax.evaluation.fewshot import check_shots, fewshot_probe
from hjepa_jax.evaluation.knn import DEFAULT_KS, TEMPERATURE, knn_probe
from hjepa_jax.evaluation.known_rows import KnownRows
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.linear import DEFAULT_L2_GRID, linear_probe
from hjepa_jax.evaluation.logistic import TOLERANCE
from hjepa_jax.evaluation.lowshot import DEFAULT_ALPHAS, DEFAULT_SHOTS, draw_labels, lowshot_probe
from hjepa_jax.evaluation.protocol import Protocol
from hjepa_jax.evaluation.quality_rows import QualityRows
from hjepa_jax.evaluation.results import encoder_name
from hjepa_jax.runs.progress import LiveLine
from hjepa_jax.runs.scores import Row

PROTOCOLS = ("linear", "knn", "lowshot", "fewshot", "quality")
TRAINED_ENCODERS = ("target", "online")

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # train_x, train_y, test_x, test_y


def evaluate_encoders(
    embed: EmbedFn,
    encoders: dict[str, Any],
    train: Split,
    test: Split,
    *,
    num_classes: int,
    step: int,
    protocol: Protocol,
    embed_views: EmbedFn | None = None,
    embed_raw: EmbedFn = embed_pixels,
    cache: FeatureCache | None = None,
    data: str = "",
    report: Callable[[list[Row]], None] = lambda rows: None,
    known: KnownRows | None = None,
) -> list[Row]:
    """Runs every protocol on every representation of every encoder, and of the raw pixels.

    Args:
      embed: `embed(encoder_params, uint8 images)`, a dict of features by name.
      encoders: parameters by name: "target", "online", "random_init".
      train: the whole training set, hold-out included.
      test: the test set, which is scored once per row.
      num_classes: number of classes.
      step: checkpoint step of the trained encoders.
      protocol: the settings.
      embed_views: `embed_views(encoder_params, uint8 images, keys)`, features of augmented views
        for LiDAR; None = no LiDAR.
      embed_raw: `embed` for the raw pixels.
      cache: storage for features; None = none.
      data: name of the data set, for the rows.
      report: called with the new rows of each probe.
      known: rows that can be reused; None = none.

    Returns:
      One row per result, with its whole protocol.
    """
    for name in protocol.protocols:
        if name not in PROTOCOLS:
            raise InputError("--protocols", name, f"must be some of {', '.join(PROTOCOLS)}")
    reads_labels = set(protocol.protocols) != {"quality"}
    if reads_labels:
        check_classes(data, train.labels, num_classes)
        _check_shots(protocol, train, test, num_classes)
    extract = Extractor(embed, protocol.batch_size, cache, embed_raw)
    quality = QualityRows(extract, protocol, train, embed_views)
    images, rows = fingerprint(train, test=test), []
    everything, embeds = {**encoders, "pixels": None}, {"pixels": embed_raw}
    probes = {
        name: _probes_of(name, params, embeds.get(name, embed), train, protocol, step, known)
        for name, params in everything.items()
    }
    missing = [probe for found in probes.values() for probe in found if not probe.known]
    early = {}
    if any(probe.name == "quality" for probe in missing):
        early = quality.measure_untrained(encoders)
    number, line = 0, LiveLine()
    for encoder, params in everything.items():
        if all(probe.known for probe in probes[encoder]):
            rows += [row for probe in probes[encoder] for row in probe.known]
            continue
        line.update(f"features: {encoder_name(encoder)} ...")
        features = early.pop(encoder, None) or extract.features(encoder, params, "train", train)
        train_x = protocol.representations(features)
        test_x = train_x
        if reads_labels:
            test_x = protocol.representations(extract.features(encoder, params, "test", test))
        if any(probe.name == "quality" and not probe.known for probe in probes[encoder]):
            quality.extract_views(encoder, params)
        source = origin(encoder, step, protocol.seed, data, train, test, images)
        for probe in probes[encoder]:
            if probe.known:
                rows += probe.known
                continue
            number += 1
            where = probe.where
            what = f"{encoder_name(encoder)} {where['pool']} level {where['level']}"
            line.update(f"probing {number} of {len(missing)}: {probe.name}, {what} ...")
            (_, _, x), (_, _, y) = train_x[probe.index], test_x[probe.index]
            if probe.name == "quality":
                scores = [quality.row(encoder, where["pool"], where["level"], x)]
            else:
                arrays = (x, train.classes, y, test.classes)
                scores = _PROBES[probe.name](arrays, num_classes, protocol)
            made = [{**where, **scored, **source, "num_rows": len(scores)} for scored in scores]
            rows += made
            line.clear()
            report(made)
    return rows


@dataclasses.dataclass(frozen=True)
class _Probe:
    """A probe of one representation of an encoder.

    Attributes:
      name: its protocol.
      index: number of the representation in `Protocol.representations`.
      where: the fields of its rows that name protocol and features.
      known: its rows if they can be reused, else empty.
    """

    name: str
    index: int
    where: Row
    known: list[Row]


def _probes_of(
    encoder: str,
    params: Any,
    embed: EmbedFn,
    train: Split,
    protocol: Protocol,
    step: int,
    known: KnownRows | None,
) -> list[_Probe]:
    """Returns all probes of an encoder in the order of their rows; computes no features."""
    images = jax.ShapeDtypeStruct((2, *train.images.shape[1:]), np.uint8)
    shapes = jax.eval_shape(embed, params, images)
    empty = {name: np.empty((0, x.shape[1]), np.float32) for name, x in shapes.items()}
    step, found = step if encoder in TRAINED_ENCODERS else 0, []
    for index, (pool, level, x) in enumerate(protocol.representations(empty)):
        for name in protocol.protocols:
            where: Row = {"protocol": name, "level": level, "pool": pool, "dim": x.shape[1]}
            if known is None:
                found.append(_Probe(name, index, where, []))
                continue
            where["made_from"] = known.made_from(name, encoder, step)
            like = {**where, "encoder": encoder, "step": step}
            found.append(_Probe(name, index, where, known.find(like)))
    return found


def origin(
    encoder: str, step: int, seed: int, data: str, train: Split, test: Split, images: str
) -> Row:
    """Returns the fields of a row that describe the encoder and the data.

    `images` is the fingerprint of train and test.
    """
    labels = test.labels
    return {
        "encoder": encoder,
        "step": step if encoder in TRAINED_ENCODERS else 0,
        "seed": seed,
        "data": data,
        "data_fingerprint": images,
        "train_size": len(train.images),
        "test_size": len(test.images),
        # Accuracy of always predicting the most frequent class; omitted without labels.
        **({} if labels is None else {"chance": float(np.bincount(labels).max() / len(labels))}),
    }


def _options(name: str, arrays: Arrays, protocol: Protocol) -> tuple[dict[str, Any], Rows]:
    """Returns options for a probe, and the rows that it fits and holds out."""
    chooses = {"num_val": protocol.num_val, "seed": protocol.seed}
    rows = hold_out(len(arrays[0]), **chooses)
    return chooses | {"what": f"{name}, {arrays[0].shape[1]} features"}, rows


def _linear(arrays: Arrays, num_classes: int, protocol: Protocol) -> list[Row]:
    options, rows = _options("linear", arrays, protocol)
    # Wide features use every second penalty: time is width times number of penalties.
    grid = DEFAULT_L2_GRID[:: 1 if arrays[0].shape[1] <= 1024 else 2]
    result = linear_probe(*arrays, num_classes=num_classes, l2_grid=grid, **options)
    settings = {"l2_grid": list(result.l2_grid), "num_val": len(rows.held), "tolerance": TOLERANCE}
    return [
        {
            "top1": result.top1,
            "chosen": {"l2": result.chosen_l2, "val_top1": max(result.val_top1)},
            "settings": settings,
            "converged": result.converged,
            "at_edge": list(result.at_edge),
        }
    ]


def _knn(arrays: Arrays, num_classes: int, protocol: Protocol) -> list[Row]:
    options, rows = _options("knn", arrays, protocol)
    ks = [k for k in DEFAULT_KS if k <= len(rows.kept)]
    result = knn_probe(*arrays, num_classes=num_classes, ks=ks, **options)
    return [
        {
            "top1": result.top1,
            "chosen": {"k": result.chosen_k, "val_top1": max(result.val_top1)},
            "settings": {"ks": ks, "temperature": TEMPERATURE, "num_val": len(rows.held)},
            "at_edge": list(result.at_edge),
        }
    ]


def _lowshot(arrays: Arrays, num_classes: int, protocol: Protocol) -> list[Row]:
    options, rows = _options("lowshot", arrays, protocol)
    shots = protocol.lowshot_labels
    if shots is None:
        smallest = np.bincount(arrays[1][rows.kept], minlength=num_classes).min()
        shots = [shot for shot in DEFAULT_SHOTS if shot <= smallest]
    return [
        {
            "labels": result.labels,
            "num_labels": result.num_labels,
            "top1": result.top1,
            "top1_std": result.top1_std,
            "per_seed": list(result.per_seed),
            "chosen": {"alpha": result.chosen_alpha, "val_top1": result.val_top1},
            "settings": {"alphas": list(DEFAULT_ALPHAS), "num_val": len(rows.held)},
            "at_edge": list(result.at_edge),
        }
        for result in lowshot_probe(*arrays, num_classes=num_classes, shots=shots, **options)
    ]


def _fewshot(arrays: Arrays, num_classes: int, protocol: Protocol) -> list[Row]:
    train_x, _, test_x, test_y = arrays
    found = []
    for shots in protocol.fewshot_shots:
        result = fewshot_probe(train_x, test_x, test_y, num_shots=shots, seed=protocol.seed)
        found.append({"labels": f"{shots}-shot", **dataclasses.asdict(result), "chosen": {}})
    return found


_PROBES = {"linear": _linear, "knn": _knn, "lowshot": _lowshot, "fewshot": _fewshot}


def _check_shots(protocol: Protocol, train: Split, test: Split, num_classes: int) -> None:
    """Refuses numbers of labels that some class does not have, before any computation."""
    if "lowshot" in protocol.protocols:
        fit, _ = hold_out(len(train.images), num_val=protocol.num_val, seed=protocol.seed)
        for shot in protocol.lowshot_labels or ():
            draw_labels(train.classes, fit, shot, num_classes=num_classes, seed=0)
    if "fewshot" in protocol.protocols:
        for shots in protocol.fewshot_shots:
            check_shots(test.classes, shots)


def check_classes(source: str, labels: Int[np.ndarray, " n"] | None, num_classes: int) -> None:
    """Refuses training labels if a class is missing: no probe can predict it ("data.source")."""
    if labels is None:
        raise InputError("data.source", source, "has no labels")
    missing: Sequence[int] = sorted(set(range(num_classes)) - set(labels.tolist()))
    if missing:
        rule = f"has no training image of class {missing[0]} ({len(missing)} of {num_classes} lack)"
        raise InputError("data.source", source, rule)
