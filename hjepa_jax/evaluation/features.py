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
from hjepa_jax.data.fingerprint import digest_arrays
from hjepa_jax.data.records import Decoded
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.backend import version
from hjepa_jax.runtime.files import replacing
from hjepa_jax.runtime.placement import make_placement

# Larger images are brought to this size for the raw-pixel rows: 3,072 numbers, as CIFAR's.
PIXEL_SIZE = 32
POOLS = ("mean", "summary", "concat")

Features = dict[str, Float[np.ndarray, "n _"]]
EmbedFn = Callable[..., dict[str, Any]]
Representation = tuple[str, int | str, Float[np.ndarray, "n _"]]


def extract_features(
    embed: EmbedFn,
    encoder_params: Any,
    images: UInt8[np.ndarray, "n H W C"] | Decoded,
    *extra: Shaped[np.ndarray, "n ..."],
    batch_size: int,
    what: str = "",
) -> dict[str, Shaped[np.ndarray, "n ..."]]:
    """Runs `embed` over all images; the last batch is padded, so it compiles once.

    Each batch is split over the devices of this process.

    Args:
      embed: jitted `embed(encoder_params, images, *extra)`, a dict of [B, ...] arrays.
      encoder_params: parameters of the encoder to judge.
      images: the images, as stored; `Decoded` ones are decoded batch by batch.
      *extra: further arguments of `embed` with a row per image (keys of an augmentation).
      batch_size: images per call; rounded up to a multiple of the number of devices.
      what: name of the work; if given, it is told how far it is and what time is left.

    Returns:
      The same dict for all images, on the host.
    """
    devices = jax.local_devices()
    place = make_placement(devices, fsdp=1)
    encoder_params = place.put(encoder_params, place.whole)

    def fn(*arrays: Any) -> dict[str, Any]:
        return embed(encoder_params, *place.put(arrays, place.rows))

    batch_size = -(-batch_size // len(devices)) * len(devices)
    return map_batches(fn, images, *extra, batch_size=batch_size, what=what)


def map_batches(
    fn: Callable[..., dict[str, Any]],
    *arrays: Shaped[np.ndarray, "n ..."] | Decoded,
    batch_size: int,
    what: str = "",
) -> dict[str, np.ndarray]:
    """Applies `fn` to the rows of the arrays in batches; the last is padded, so it compiles once.

    Args:
      fn: from `batch_size` rows of each array to a dict of arrays with as many rows.
      *arrays: of one length.
      batch_size: rows per call.
      what: name of the work, for a progress bar; empty for none.

    Returns:
      The dict for all rows, on the host.
    """
    n, found = len(arrays[0]), {}
    with progress(what, n, unit=" images") as bar:
        for start in range(0, n, batch_size):
            batch = [array[start : start + batch_size] for array in arrays]
            count = len(batch[0])
            padded = [
                np.pad(array, [(0, batch_size - count)] + [(0, 0)] * (array.ndim - 1))
                for array in batch
            ]
            for name, value in jax.device_get(fn(*padded)).items():
                if name not in found:
                    found[name] = np.empty((n, *value.shape[1:]), value.dtype)
                found[name][start : start + count] = value[:count]
            bar.update(count)
    return found


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
    """Extracted features in a directory: one file per encoder, split and data set.

    A file knows what it was made from: program, parameters and images. If one of them changes, the
    features are extracted again. Those of changed images get a file of their own.

    Args:
      directory: made when something is kept.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory

    def get(
        self,
        name: str,
        make: Callable[[], Features],
        embed: EmbedFn,
        encoder_params: Any,
        *arrays: Shaped[np.ndarray, "n ..."],
    ) -> Features:
        """Reads the features, or makes and keeps them.

        Args:
          name: name of the file: encoder and split. A digest of the arrays is added to it.
          make: extracts the features.
          embed: the jitted function that does it.
          encoder_params: its first argument.
          *arrays: its other arguments, a row per image.
        """
        images = digest_arrays(*arrays)
        program = program_digest(embed, encoder_params, *arrays)
        made_from = f"{program} {params_digest(encoder_params)} {images}"
        path = self._directory / f"{name}_{images}.npz"
        if path.exists():
            try:
                with path.open("rb") as file, np.load(file) as stored:
                    if str(stored["made_from"]) == made_from:
                        return {key: stored[key] for key in stored.files if key != "made_from"}
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                pass  # damaged on disk: made anew
        features = make()
        self._directory.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, made_from=np.array(made_from), **features)  # pyright: ignore[reportArgumentType]
        return features


def params_digest(params: Any) -> str:
    """16 hexadecimal digits over the names, shapes and values of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def program_digest(
    embed: EmbedFn, encoder_params: Any, *arrays: Shaped[np.ndarray, "n ..."]
) -> str:
    """16 hexadecimal digits over all that `embed` computes, and what with.

    That is its program as it is handed to the compiler: preprocessing, networks, and all constants.
    So a change of config or code changes the digest if and only if it changes what is computed.
    Version of the compiler and backend count too, for they round differently.

    Args:
      embed: a jitted function `embed(encoder_params, *arrays)`.
      encoder_params: only types and shapes count.
      *arrays: types and shapes of their rows count, but not the number of rows.
    """
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), encoder_params)
    rows = [jax.ShapeDtypeStruct((2, *array.shape[1:]), array.dtype) for array in arrays]
    program = embed.lower(params, *rows).as_text()  # pyright: ignore[reportFunctionMemberAccess]
    about = f"{jax.default_backend()} {version('jaxlib')} {program}"
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def embed_pixels(_: Any, images: UInt8[jax.Array, "B H W C"]) -> dict[str, Float[jax.Array, "B _"]]:
    """The "encoder" of the raw-pixel baseline: the pixels themselves, at most 32x32."""
    size = min(PIXEL_SIZE, *images.shape[1:3])
    pixels = resize_and_normalize(images, image_size=size, mean=(0.0,) * 3, std=(1.0,) * 3)
    return {"pixels": pixels.reshape(len(images), -1)}


def check_levels(levels: Sequence[int], num_levels: int) -> None:
    """Refuses levels that a model of `num_levels` has not ("--levels")."""
    for level in levels:
        if not 0 <= level < num_levels:
            rule = f"must be levels of the model, 0 to {num_levels - 1}"
            raise InputError("--levels", level, rule)


def representations(
    features: Features, *, levels: Sequence[int] | None = None, pools: Sequence[str] = POOLS
) -> list[Representation]:
    """What of an encoder's features a probe is tried on, as (pool, level, array).

    Every level by itself, the levels concatenated, the summary tokens, and everything together.
    Where not all levels are taken, what is concatenated of them is called "0+1", not "all".

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
    everything: int | str = "all"
    if levels is not None and set(levels) != set(range(len(names))):
        check_levels(levels, len(names))
        chosen = sorted(set(levels))
        names = [f"level_{level}" for level in chosen]
        everything = chosen[0] if len(chosen) == 1 else "+".join(map(str, chosen))
    found: list[Representation] = [
        ("mean", int(name.removeprefix("level_")), features[name]) for name in names
    ]
    if len(names) > 1:
        found.append(("mean", everything, np.concatenate([features[n] for n in names], axis=1)))
    if "summary" in features:
        found.append(("summary", "all", features["summary"]))
        parts = [features[name] for name in (*names, "summary")]
        found.append(("concat", everything, np.concatenate(parts, axis=1)))
    found = [entry for entry in found if entry[0] in pools]
    if not found:
        raise InputError("--pools", ",".join(pools), "leaves nothing: the model has no such tokens")
    return found
