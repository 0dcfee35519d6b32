"""The evaluation protocol: which encoders, which features, which probes.

Every probe of the trained encoder stands beside the same probe of a randomly initialised encoder
and of the raw pixels: a number means little without the two.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from hjepa_jax.data.base import Split
from hjepa_jax.data.fingerprint import fingerprint
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation import quality
from hjepa_jax.evaluation.features import (
    POOLS,
    EmbedFn,
    FeatureCache,
    Features,
    embed_pixels,
    extract_features,
    representations,
)
from hjepa_jax.evaluation.fewshot import check_shots, fewshot_probe
from hjepa_jax.evaluation.knn import DEFAULT_KS, TEMPERATURE, knn_probe
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.linear import DEFAULT_L2_GRID, TOLERANCE, linear_probe
from hjepa_jax.evaluation.lowshot import DEFAULT_ALPHAS, DEFAULT_SHOTS, draw_labels, lowshot_probe
from hjepa_jax.runs.scores import Row

PROTOCOLS = ("linear", "knn", "lowshot", "fewshot", "quality")
TRAINED_ENCODERS = ("target", "online")

# `quality` looks at this many training images, and LiDAR at so many views of so many of them.
QUALITY_ROWS = 10_000
LIDAR_IMAGES, LIDAR_VIEWS = 1000, 5


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is judged, and how: the same for every encoder.

    Attributes:
      protocols: some of `PROTOCOLS`.
      levels: levels to judge; None for all.
      pools: some of `features.POOLS`.
      num_val: training images on which hyper-parameters are chosen; at most a fifth of them.
      seed: of that hold-out, of low-shot draws and of episodes.
      batch_size: images per call of the encoder.
      lowshot_labels: labels per class, or fractions; None for those of `lowshot.DEFAULT_SHOTS` that
        the smallest class can give.
      fewshot_shots: examples per class in an episode.
    """

    protocols: tuple[str, ...] = ("linear", "knn")
    levels: tuple[int, ...] | None = None
    pools: tuple[str, ...] = POOLS
    num_val: int = 5000
    seed: int = 0
    batch_size: int = 256
    lowshot_labels: tuple[int | float, ...] | None = None
    fewshot_shots: tuple[int, ...] = (1, 5)


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
    cache: FeatureCache | None = None,
    data: str = "",
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Runs every protocol on every representation of every encoder, and of the raw pixels.

    Args:
      embed: `embed(encoder_params, uint8 images)`, a dict of features by name.
      encoders: parameters by name: "target", "online", "random_init".
      train: the whole training set; the hold-out for choosing is taken from it.
      test: the test set, which is scored once per row.
      num_classes: number of classes.
      step: checkpoint step of the trained encoders.
      protocol: what to run.
      embed_views: `embed_views(encoder_params, uint8 images, keys)`, features of augmented views,
        for LiDAR; without it that number is left out.
      cache: where extracted features are kept; None to keep none.
      data: name of the data set, for the rows.
      report: called with each row as it is done.

    Returns:
      One row per result, with its whole protocol.

    Raises:
      InputError: for a protocol, level or pool that there is not, labels without some class, or
        fewer images than a probe needs.
    """
    for name in protocol.protocols:
        if name not in PROTOCOLS:
            raise InputError("--protocols", name, f"must be some of {', '.join(PROTOCOLS)}")
    check_classes(data, train.labels, num_classes)
    _check_shots(protocol, train, test, num_classes)
    extract = _Extractor(embed, protocol, cache)
    images, rows = fingerprint(train, test=test), []
    for encoder, params in {**encoders, "pixels": None}.items():
        train_x, test_x = (
            representations(
                extract.features(encoder, params, name, split),
                levels=protocol.levels,
                pools=protocol.pools,
            )
            for name, split in (("train", train), ("test", test))
        )
        views = {}
        if "quality" in protocol.protocols and encoder != "pixels" and embed_views is not None:
            features = extract.views(embed_views, encoder, params, train)
            options = {"levels": protocol.levels, "pools": protocol.pools}
            views = {(p, lv): x for p, lv, x in representations(features, **options)}
        for (pool, level, x), (_, _, y) in zip(train_x, test_x, strict=True):
            arrays = (x, train.labels, y, test.labels)
            for name in protocol.protocols:
                for scored in _score(name, arrays, views.get((pool, level)), num_classes, protocol):
                    row = {
                        "protocol": name,
                        "level": level,
                        "pool": pool,
                        "dim": x.shape[1],
                        **scored,
                        **origin(encoder, step, protocol.seed, data, train, test, images),
                    }
                    rows.append(row)
                    report(row)
    return rows


def origin(
    encoder: str, step: int, seed: int, data: str, train: Split, test: Split, images: str
) -> Row:
    """What a row says of the encoder and the data it comes from.

    Args:
      encoder: its name.
      step: of the checkpoint.
      seed: of the protocol.
      data: name of the data set.
      train: its training images.
      test: its test images.
      images: fingerprint of both.
    """
    return {
        "encoder": encoder,
        "step": step if encoder in TRAINED_ENCODERS else 0,
        "seed": seed,
        "data": data,
        "data_fingerprint": images,
        "train_size": len(train.labels),
        "test_size": len(test.labels),
    }


@dataclasses.dataclass(frozen=True)
class _Extractor:
    """Features by encoder and split, from the cache where they are there."""

    embed: EmbedFn
    protocol: Protocol
    cache: FeatureCache | None

    def features(self, encoder: str, params: Any, name: str, split: Split) -> Features:
        if encoder == "pixels":  # quicker made than read
            size = self.protocol.batch_size
            return extract_features(jax.jit(embed_pixels), params, split.images, batch_size=size)
        what = f"{encoder} features, {name}"
        return self._kept(f"{encoder}_{name}", what, self.embed, params, split.images)

    def views(self, embed_views: EmbedFn, encoder: str, params: Any, split: Split) -> Features:
        """Features of augmented views: the rows of one image follow each other."""
        rows = _sample(len(split.images), LIDAR_IMAGES)
        images = np.repeat(split.images[rows], LIDAR_VIEWS, axis=0)
        rngs = jax.random.split(jax.random.PRNGKey(self.protocol.seed), len(images))
        what = f"{encoder} features, augmented views"
        return self._kept(f"{encoder}_views", what, embed_views, params, images, np.asarray(rngs))

    def _kept(
        self, name: str, what: str, embed: EmbedFn, params: Any, *arrays: np.ndarray
    ) -> Features:
        jitted = jax.jit(embed)

        def extract() -> Features:
            size = self.protocol.batch_size
            return extract_features(jitted, params, *arrays, batch_size=size, what=what)

        if self.cache is None:
            return extract()
        return self.cache.get(name, extract, jitted, params, *arrays)


def _score(
    name: str,
    arrays: tuple[np.ndarray, ...],
    views: np.ndarray | None,
    num_classes: int,
    protocol: Protocol,
) -> list[Row]:
    """What one protocol says of one representation; low-shot and few-shot say several things."""
    train_x, train_y, test_x, test_y = arrays
    if name == "fewshot":
        found = []
        for shots in protocol.fewshot_shots:
            result = fewshot_probe(train_x, test_x, test_y, num_shots=shots, seed=protocol.seed)
            labels = f"{shots}-shot"
            found.append({"labels": labels, **dataclasses.asdict(result), "chosen": {}})
        return found
    if name == "quality":
        return [judge_quality(train_x[_sample(len(train_x), QUALITY_ROWS)], views)]
    chooses = {"num_val": protocol.num_val, "seed": protocol.seed}
    fit, val = hold_out(len(train_x), **chooses)
    shown = {"what": f"{name}, {train_x.shape[1]} features"}
    if name == "linear":
        # Half of the penalties where the features are wide, raw pixels above all: time is D x G.
        grid = DEFAULT_L2_GRID[:: 1 if train_x.shape[1] <= 1024 else 2]
        result = linear_probe(*arrays, num_classes=num_classes, l2_grid=grid, **chooses, **shown)
        chosen = {"l2": result.chosen_l2, "val_top1": max(result.val_top1)}
        how = {"l2_grid": list(result.l2_grid), "num_val": len(val), "tolerance": TOLERANCE}
        row = {"top1": result.top1, "chosen": chosen, "settings": how}
        return [row | {"converged": result.converged, "at_edge": list(result.at_edge)}]
    if name == "knn":
        ks = [k for k in DEFAULT_KS if k <= len(fit)]
        result = knn_probe(*arrays, num_classes=num_classes, ks=ks, **chooses, **shown)
        chosen = {"k": result.chosen_k, "val_top1": max(result.val_top1)}
        how = {"ks": ks, "temperature": TEMPERATURE, "num_val": len(val)}
        row = {"top1": result.top1, "chosen": chosen, "settings": how}
        return [row | {"at_edge": list(result.at_edge)}]
    shots = protocol.lowshot_labels
    if shots is None:
        smallest = np.bincount(train_y[fit], minlength=num_classes).min()
        shots = [shot for shot in DEFAULT_SHOTS if shot <= smallest]
    found = lowshot_probe(*arrays, num_classes=num_classes, shots=shots, **chooses, **shown)
    how = {"alphas": list(DEFAULT_ALPHAS), "num_val": len(val)}
    return [
        {
            "labels": result.labels,
            "num_labels": result.num_labels,
            "top1": result.top1,
            "top1_std": result.top1_std,
            "per_seed": list(result.per_seed),
            "chosen": {"alpha": result.chosen_alpha, "val_top1": result.val_top1},
            "settings": how,
            "at_edge": list(result.at_edge),
        }
        for result in found
    ]


def judge_quality(
    features: Float[np.ndarray, "n D"], views: Float[np.ndarray, "m D"] | None = None
) -> Row:
    """Every label-free number about a representation, and whether it has collapsed.

    Args:
      features: features of n images.
      views: features of augmented views, `LIDAR_VIEWS` rows per image; None: no LiDAR.

    Returns:
      The numbers of `evaluation.quality` by name, None where one is not defined; the verdict with
      its thresholds; the 100 largest singular values of the centred features over their sum.
    """
    sigma = quality.singular_values(features)
    verdict = quality.collapse_verdict(features, spectrum=sigma)
    numbers = {
        "feature_std": quality.feature_std(features),
        "rankme": quality.rankme(features),
        "alpha_req": quality.alpha_req(features, spectrum=sigma),
        "uniformity": quality.uniformity(features),
    }
    if views is not None and len(views) >= 2 * LIDAR_VIEWS:
        numbers["lidar"] = quality.lidar(views.reshape(-1, LIDAR_VIEWS, views.shape[1]))
    fields = dataclasses.asdict(verdict)
    return {
        "verdict": fields.pop("label"),
        **fields,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "spectrum": (sigma[:100] / max(sigma.sum(), np.finfo(np.float64).tiny)).tolist(),
        "num_images": len(features),
        "chosen": {},
    }


def _sample(n: int, size: int) -> Int[np.ndarray, " rows"]:
    """At most `size` of n rows, the same for every encoder: a source may be sorted by class."""
    return np.sort(np.random.default_rng(0).permutation(n)[:size])


def _check_shots(protocol: Protocol, train: Split, test: Split, num_classes: int) -> None:
    """Refuses examples per class that some class cannot give, before anything is computed."""
    if "lowshot" in protocol.protocols:
        fit, _ = hold_out(len(train.labels), num_val=protocol.num_val, seed=protocol.seed)
        for shot in protocol.lowshot_labels or ():
            draw_labels(train.labels, fit, shot, num_classes=num_classes, seed=0)
    if "fewshot" in protocol.protocols:
        for shots in protocol.fewshot_shots:
            check_shots(test.labels, shots)


def check_classes(source: str, labels: Int[np.ndarray, " n"], num_classes: int) -> None:
    """Refuses training labels in which a class is missing: no probe could ever predict it.

    Raises:
      InputError: ("data.source").
    """
    missing: Sequence[int] = sorted(set(range(num_classes)) - set(labels.tolist()))
    if missing:
        rule = f"has no training image of class {missing[0]} ({len(missing)} of {num_classes} lack)"
        raise InputError("data.source", source, rule)
