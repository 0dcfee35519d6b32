"""Features of whole data sets from a frozen encoder: in batches of one shape, kept on disk."""

import hashlib
import pathlib
import sys
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from tqdm import tqdm

from hjepa_jax.data.augment import resize_and_normalize
from hjepa_jax.errors import InputError

# Larger images are brought to this size for the raw-pixel rows: 3,072 numbers, as CIFAR's.
PIXEL_SIZE = 32
POOLS = ("mean", "summary", "concat")

Features = dict[str, Float[np.ndarray, "n _"]]
EmbedFn = Callable[..., dict[str, Any]]
Representation = tuple[str, int | str, Float[np.ndarray, "n _"]]


def extract_features(
    embed: EmbedFn,
    encoder_params: Any,
    images: UInt8[np.ndarray, "n H W C"],
    *extra: Shaped[np.ndarray, "n ..."],
    batch_size: int,
    what: str = "",
) -> Features:
    """Runs `embed` over all images; the last batch is padded, so it compiles once.

    Args:
      embed: jitted `embed(encoder_params, images, *extra)`, a dict of [B, ...] arrays.
      encoder_params: parameters of the encoder to judge.
      images: the images, as stored.
      *extra: further arguments of `embed` with a row per image (keys of an augmentation).
      batch_size: images per call.
      what: name of the work; if given, it is told how far it is and what time is left.

    Returns:
      The same dict for all images, on the host.
    """
    parts = []
    with progress(what, len(images), unit=" images") as bar:
        for start in range(0, len(images), batch_size):
            batch = [array[start : start + batch_size] for array in (images, *extra)]
            count = len(batch[0])
            padded = [
                np.pad(array, [(0, batch_size - count)] + [(0, 0)] * (array.ndim - 1))
                for array in batch
            ]
            features = jax.device_get(embed(encoder_params, *padded))
            parts.append({name: value[:count] for name, value in features.items()})
            bar.update(count)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def progress(what: str, total: int, *, unit: str, initial: int = 0, iterable: Any = None) -> Any:
    """A bar with the time left, from 5 seconds on; seldom where it goes to a file.

    Args:
      what: name of the work; empty for no bar.
      total: number of things to do.
      unit: what they are called.
      initial: how many of them were done before.
      iterable: the things themselves, to loop over; None where `update` tells how many are done.
    """
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        iterable, total=total, desc=what, unit=unit, initial=initial, delay=5, mininterval=interval,
        disable=not what, leave=False, dynamic_ncols=True,
    )  # fmt: skip


class FeatureCache:
    """Extracted features in a directory, one file per encoder, checkpoint, split and data.

    Args:
      directory: made when something is kept.
      version: what else the features depend on (package version, image size); part of the name.
    """

    def __init__(self, directory: pathlib.Path, *, version: str):
        self._directory = directory
        self._version = hashlib.sha256(version.encode()).hexdigest()[:8]

    def get(self, name: str, step: int, data: str, make: Callable[[], Features]) -> Features:
        """Reads the features, or makes and keeps them.

        Args:
          name: encoder and split.
          step: checkpoint step; files of the same name and data at other steps are removed when
            new ones are written, so that a directory does not grow with every checkpoint.
          data: fingerprint of the images.
          make: extracts the features.
        """
        prefix = f"{name}_{data}_{self._version}_step_"
        path = self._directory / f"{prefix}{step}.npz"
        if path.exists():
            try:
                with path.open("rb") as file, np.load(file) as stored:
                    return dict(stored)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile):
                path.unlink()  # damaged on disk: made anew below
        features = make()
        self._directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **features)  # pyright: ignore[reportArgumentType]
        partial.replace(path)
        for old in self._directory.glob(f"{prefix}*.npz"):
            if old != path:
                old.unlink()
        return features


def embed_pixels(_: Any, images: UInt8[jax.Array, "B H W C"]) -> dict[str, Float[jax.Array, "B _"]]:
    """The "encoder" of the raw-pixel baseline: the pixels themselves, at most 32x32."""
    size = min(PIXEL_SIZE, images.shape[1])
    pixels = resize_and_normalize(images, image_size=size, mean=(0.0,) * 3, std=(1.0,) * 3)
    return {"pixels": pixels.reshape(len(images), -1)}


def representations(
    features: Features, *, levels: Sequence[int] | None = None, pools: Sequence[str] = POOLS
) -> list[Representation]:
    """What of an encoder's features a probe is tried on, as (pool, level, array).

    Every level by itself, the levels concatenated, the summary tokens, and everything together.

    Args:
      features: `level_{l}` and perhaps `summary`; or `pixels`, which is always taken.
      levels: levels to take; None for all.
      pools: some of `POOLS`.

    Raises:
      InputError: for a level that there is not ("--levels"), or when nothing is left ("--pools").
    """
    if "pixels" in features:
        return [("concat", 0, features["pixels"])]
    names = [name for name in features if name.startswith("level_")]
    if levels is not None:
        for level in levels:
            if f"level_{level}" not in names:
                rule = f"must be levels of the model, 0 to {len(names) - 1}"
                raise InputError("--levels", level, rule)
        names = [f"level_{level}" for level in levels]
    found: list[Representation] = [
        ("mean", int(name.removeprefix("level_")), features[name]) for name in names
    ]
    if len(names) > 1:
        found.append(("mean", "all", np.concatenate([features[n] for n in names], axis=1)))
    if "summary" in features:
        found.append(("summary", "all", features["summary"]))
        everything = [features[name] for name in (*names, "summary")]
        found.append(("concat", "all", np.concatenate(everything, axis=1)))
    found = [entry for entry in found if entry[0] in pools]
    if not found:
        raise InputError("--pools", ",".join(pools), "leaves nothing: the model has no such tokens")
    return found
