"""Features of whole data sets from a frozen encoder, computed in batches of one shape."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Num, Shaped
from tqdm import tqdm

from hjepa_jax.data.augment import centre_box, resize_and_normalize
from hjepa_jax.data.records import Decoded
from hjepa_jax.data.sides import Sides
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.placement import make_placement

# Largest side of the images of the raw-pixel baseline: 3,072 numbers per RGB image, as in CIFAR.
PIXEL_SIZE = 32
POOLS = ("mean", "summary", "concat")

Features = dict[str, Float[np.ndarray, "n _"]]
EmbedFn = Callable[..., dict[str, Any]]
Representation = tuple[str, int | str, Float[np.ndarray, "n _"]]


def extract_features(
    embed: EmbedFn,
    encoder_params: Any,
    images: Num[np.ndarray, "n H W C"] | Decoded,
    *extra: Shaped[np.ndarray, "n ..."],
    batch_size: int,
    what: str = "",
) -> dict[str, Shaped[np.ndarray, "n ..."]]:
    """Returns the outputs of `embed` for all images, on the host.

    The devices of this process share each batch.

    Args:
      embed: jitted `embed(encoder_params, images, *extra)`, a dict of [B, ...] arrays.
      encoder_params: parameters of the encoder.
      images: stored images; `Decoded` images are decoded batch by batch.
      *extra: further arguments of `embed`, one row per image, such as keys of an augmentation.
      batch_size: images per call, rounded up to a multiple of the number of devices.
      what: title of the progress bar; empty = none.
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
    """Returns the outputs of `fn` for all rows, on the host.

    `fn` takes `batch_size` rows of each array, and returns a dict of arrays with the same number of
    rows. The last batch is padded, so that `fn` compiles once.
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
    """Returns a progress bar that appears after 5 seconds; in a log file it has few updates.

    No bar appears if `what` is empty. Without an `iterable`, the caller calls `update`.
    """
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        iterable, total=total, desc=what, unit=unit, initial=initial, delay=5, mininterval=interval,
        disable=not what, leave=False, dynamic_ncols=True,
    )  # fmt: skip


def embed_pixels(
    _: Any, images: Num[jax.Array, "B H W C"], *, image_size: Sides = 1
) -> dict[str, Float[jax.Array, "B _"]]:
    """Returns the features of the raw-pixel baseline: pixels of images of at most 32x32.

    The images are cropped to the central box that an encoder for `image_size` sees, and reduced.
    """
    *box, _, _ = centre_box(images.shape[1:3], image_size)
    shrink, c = min(1.0, PIXEL_SIZE / max(box)), images.shape[3]
    size = (max(1, round(shrink * box[0])), max(1, round(shrink * box[1])))
    pixels = resize_and_normalize(images, image_size=size, mean=(0.0,) * c, std=(1.0,) * c)
    return {"pixels": pixels.reshape(len(images), -1)}


def check_levels(levels: Sequence[int], num_levels: int) -> None:
    """Refuses levels that a model with `num_levels` does not have ("--levels")."""
    for level in levels:
        if not 0 <= level < num_levels:
            rule = f"must be levels of the model, 0 to {num_levels - 1}"
            raise InputError("--levels", level, rule)


def representations(
    features: Features, *, levels: Sequence[int] | None = None, pools: Sequence[str] = POOLS
) -> list[Representation]:
    """Returns the representations that probes judge, as (pool, level, array).

    These are: every single level, all levels concatenated, the summary tokens, and everything
    concatenated. The level of a concatenation of some levels is "0+1" instead of "all".

    Args:
      features: `level_{l}` and perhaps `summary`; or `pixels`, which is always taken.
      levels: levels to take; None = all.
      pools: some of `POOLS`.

    Raises:
      InputError: a level does not exist ("--levels"), or nothing is left ("--pools").
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
