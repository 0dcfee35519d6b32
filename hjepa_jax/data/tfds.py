"""The `tfds:<name>` source: image sets of TensorFlow Datasets, with class labels or without.

Prepared data is read in place; other data is downloaded. Without a network TFDS retries for minutes
and prints nothing, so this module first checks that the host of the download answers.
"""

import contextlib
import io
import ssl
import sys
import threading
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from jaxtyping import Num

from hjepa_jax.data import tfds_records
from hjepa_jax.data.base import Source, SourceInfo, Split, fit_pixels, is_streamed
from hjepa_jax.data.image_file import sides_of
from hjepa_jax.data.pixels import channels_of, check_pixels
from hjepa_jax.data.records import NOT_STREAMED, Streaming
from hjepa_jax.data.rows import num_held_out
from hjepa_jax.data.sides import SAMPLE, Sides, pair, stored_sides
from hjepa_jax.data.test_split import draw_test, hold_out_test, keep_rows
from hjepa_jax.data.tfds_info import (
    class_names,
    formats_of,
    held_out,
    image_and_label,
    made_from,
    splits_line,
    test_splits,
)
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.runtime.backend import quiet_tensorflow
from hjepa_jax.runtime.user_cache import kept_arrays

SMALL_DOWNLOAD_BYTES = 2**28  # the decoded images of a smaller download always fit into memory
PROBE_SEC = 5.0  # seconds that the host of a download may take to answer
READ_BATCH = 1000  # images per batch of TensorFlow
ADVICE = (
    "point --config.data.dir to a folder where TFDS has prepared it, or train without any "
    "download: --config=configs/shapes_tiny.py"
)


def open_tfds(
    source: str,
    name: str,
    data_dir: str | None,
    image_size: Sides,
    streaming: Streaming = NOT_STREAMED,
    may_download: bool = True,
    num_channels: int | None = 3,
    stored_area: float = 1.0,
) -> Source:
    """Opens `tfds:<name>`; see `hjepa_jax.data.sources.open_source`."""
    builder = _prepared_builder(source, name, data_dir, streaming, may_download)
    shape, dtype = _image_kind(source, builder, image_size, num_channels)
    splits, train_name = builder.info.splits, streaming.train_split or "train"
    if train_name not in splits:
        rule = f"must be a split of {source}: {', '.join(splits)}"
        raise InputError("data.train_split", train_name, rule)
    stored = shape[:2]
    if stored_area > 1 and None in builder.info.features[image_and_label(builder)[0]].shape:
        stored = stored_sides(_sample_sides(source, builder, train_name), image_size, stored_area)
    stored, num_train = (*stored, shape[2]), splits[train_name].num_examples
    if formats_of(builder) != {"array_record"} and is_streamed(streaming, num_train, stored, dtype):
        if stored != shape:
            text = f"crops are cut from images reduced to {shape[0]}x{shape[1]}: larger ones do not"
            print(f"{source}: {text} fit into memory", file=sys.stderr)
        stored = shape
    if is_streamed(streaming, num_train, stored, dtype):
        return tfds_records.open_streamed(source, builder, shape, streaming, dtype, stored)
    return _open_resident(source, builder, shape, dtype, stored)


def _prepared_builder(
    source: str, name: str, data_dir: str | None, streaming: Streaming, may_download: bool
) -> Any:
    """Returns the builder of a set, which is downloaded if it is not prepared."""
    try:
        import tensorflow_datasets as tfds  # does not import TensorFlow yet
        from tensorflow_datasets.core.utils import gcs_utils

        # Older releases first look into a Google bucket: without a network, for minutes.
        gcs_utils._is_gcs_disabled = True
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # no such set, or the prepared data is damaged
        raise InputError("data.source", source, first_line(error)) from error
    if not builder.data_path.exists():  # is_prepared() would log a warning
        if not may_download:
            rule = f"is not in {builder.data_dir}, and nothing is downloaded here; {ADVICE}"
            raise InputError("data.source", source, rule)
        if _may_be_streamed(streaming, builder):
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        _download(source, builder)
    return builder


def _image_kind(
    source: str, builder: Any, image_size: Sides, num_channels: int | None
) -> tuple[tuple[int, int, int], str]:
    """Returns shape and type of decoded images, and refuses a set without images to train on."""
    try:
        image: Any = builder.info.features[image_and_label(builder)[0]]
    except ValueError as error:
        raise InputError("data.source", source, "must be a set with one image per row") from error
    if "train" not in builder.info.splits:
        raise InputError("data.source", source, "must be a set with a split train")
    dtype, stored = np.dtype(image.np_dtype), image.shape[-1] or 0
    if rule := check_pixels("images", dtype, stored):
        raise InputError("data.source", source, rule)
    channels = channels_of(source, stored, num_channels)
    height, width = pair(image_size) if None in image.shape else image.shape[:2]
    return (int(height), int(width), channels), dtype.name


def _sample_sides(source: str, builder: Any, name: str) -> list[tuple[int, int]]:
    """Returns heights and widths of some images of a split; the result is cached on disk."""

    def sample() -> dict[str, np.ndarray]:
        is_record = formats_of(builder) == {"array_record"}
        read, sides = tfds_records.read_encoded if is_record else _read_encoded, []
        try:
            encoded = read(builder, name, SAMPLE)
        except Exception as error:  # see `_read_split`
            rule = f"split {name} in {builder.data_path} cannot be read: {first_line(error)}"
            raise InputError("data.source", source, rule) from error
        for each in encoded:
            with contextlib.suppress(Exception):  # corrupt images are reported when they are read
                sides.append(sides_of(io.BytesIO(each), upright=False))
        return {"sides": np.array(sides)}

    key = f"sides {builder.info.full_name} {name} {builder.data_path}"
    sides = kept_arrays(key, sample, made_from=made_from(builder))["sides"]
    return [(int(height), int(width)) for height, width in sides]


def _open_resident(
    source: str,
    builder: Any,
    shape: tuple[int, int, int],
    dtype: str,
    stored: tuple[int, int, int],
) -> Source:
    """Returns a source that decodes all images into memory; the arrays are cached on disk."""
    splits, candidates = builder.info.splits, test_splits(builder)
    test_name = candidates[0] if candidates else None
    names = class_names(builder)

    def decode() -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for name in ("train", *candidates):
            images, labels = _read_split(source, builder, name, shape, dtype)
            is_labelled = tfds_records.has_labels(labels)
            # As for streamed sets: if a test split has no labels, the next one is tried.
            if name != "train" and "train_labels" in arrays and not is_labelled:
                continue
            if is_labelled and labels.min() < 0:
                raise InputError("data.source", source, f"split {name} has images without a label")
            arrays[f"{name}_images"] = images
            if is_labelled:
                arrays[f"{name}_labels"] = labels
            if name != "train":
                break
        return arrays

    def load() -> tuple[Split, Split]:
        key = f"{builder.info.full_name} {shape} {builder.data_path}"
        arrays = kept_arrays(key, decode, made_from=made_from(builder))
        train = Split(arrays["train_images"], arrays.get("train_labels"))
        if names and train.labels is None:
            print(f"{source}: split train has no labels", file=sys.stderr, flush=True)
        found = next((name for name in candidates if f"{name}_images" in arrays), None)
        if found != test_name:
            test = f"in split {found}" if found else held_out(names)
            line = f"{source}: split {test_name} has no labels; test images {test}"
            print(line, file=sys.stderr, flush=True)
        if found is None:
            return hold_out_test(source, train)
        labels = None if train.labels is None else arrays[f"{found}_labels"]
        return train, Split(arrays[f"{found}_images"], labels)

    def originals(train: Split) -> Num[np.ndarray, "n H W C"]:
        images, labels = _read_split(source, builder, "train", stored, dtype)
        if len(images) > len(train.images):  # test images are held out
            found = labels if tfds_records.has_labels(labels) else None
            images = keep_rows(images, draw_test(source, len(images), found, ()).kept)
        return images

    num_train = splits["train"].num_examples
    num_test = splits[test_name].num_examples if test_name else num_held_out(source, num_train)
    num_train -= 0 if test_name else num_test
    used = ("train", test_name)
    usage = splits_line(source, builder, used, num_train, num_test, class_names=names)
    info = SourceInfo(num_train, num_test, shape, names, dtype)
    again = None if stored == shape else originals
    return Source(source, info, load, stored=stored[:2], originals=again, usage=usage)


def _may_be_streamed(streaming: Streaming, builder: Any) -> bool:
    """Returns whether to prepare a set for streaming; its decoded size is not known yet."""
    size = sum(info.size for info in (builder.url_infos or {}).values() if info)
    return streaming.when == "always" or (
        streaming.when == "auto" and not 0 < size < SMALL_DOWNLOAD_BYTES
    )


def _read_split(
    source: str, builder: Any, name: str, shape: tuple[int, int, int], dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes images and labels of a split, in the order of its files; -1 is no label.

    Raises:
      InputError: an image cannot be read.
    """
    try:
        if formats_of(builder) == {"array_record"}:  # TensorFlow cannot read it
            return tfds_records.read_split(builder, name, shape)
        return _decode_split(builder, name, shape, dtype)
    except InputError:
        raise
    except Exception as error:  # TensorFlow on damaged files, or it is not installed
        rule = f"split {name} in {builder.data_path} cannot be read: {first_line(error)}"
        raise InputError("data.source", source, rule) from error


def _decode_split(
    builder: Any, name: str, shape: tuple[int, int, int], dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    tf, tfds = _tensorflow()
    options = tf.data.Options()
    options.autotune.enabled = False  # tuning takes longer than reading
    read_config = tfds.ReadConfig(
        options=options,
        interleave_cycle_length=1,  # one shard after the other: the order of the files
        try_autocache=False,
        num_parallel_calls_for_decode=8,
    )
    image_key, label_key = image_and_label(builder)
    wanted = {key: True for key in (image_key, label_key) if key}
    one_size = None not in builder.info.features[image_key].shape
    dataset = builder.as_dataset(
        split=name,
        batch_size=READ_BATCH if one_size else None,
        decoders=tfds.decode.PartialDecoding(wanted),
        read_config=read_config,
    )
    num_examples = builder.info.splits[name].num_examples
    images = np.empty((num_examples, *shape), dtype)
    labels = np.empty(num_examples, np.int32)
    start = 0
    for row in dataset.as_numpy_iterator():
        image, label = row[image_key], row[label_key] if label_key else -1
        if not one_size:
            image = fit_pixels(image, shape)[None]
        stop = start + len(image)
        images[start:stop] = image  # grey values broadcast to all channels
        labels[start:stop] = label
        start = stop
    return images, labels


def _read_encoded(builder: Any, name: str, count: int) -> list[bytes]:
    """Returns the first files of a split, not decoded."""
    _, tfds = _tensorflow()
    key = image_and_label(builder)[0]
    decoders = tfds.decode.PartialDecoding({key: True}, {key: tfds.decode.SkipDecoding()})
    count = min(count, builder.info.splits[name].num_examples)
    rows = builder.as_dataset(split=f"{name}[:{count}]", decoders=decoders)
    return [row[key] for row in rows.as_numpy_iterator()]


def _tensorflow() -> tuple[Any, Any]:
    """Imports TensorFlow and TFDS, and hides the GPU from TensorFlow."""
    quiet_tensorflow()
    import tensorflow as tf
    import tensorflow_datasets as tfds

    with contextlib.suppress(RuntimeError):  # TensorFlow is already set up by the caller
        tf.config.set_visible_devices([], "GPU")
    return tf, tfds


def _download(source: str, builder: Any) -> None:
    """Downloads and prepares a set, with progress on stderr."""
    url_infos = {url: info for url, info in (builder.url_infos or {}).items() if url[:4] == "http"}
    for url in list(url_infos)[:1]:
        if reason := _why_unreachable(url):
            rule = f"is not in {builder.data_dir} and {url} cannot be reached ({reason}); {ADVICE}"
            raise InputError("data.source", source, rule)
    size = sum(info.size for info in url_infos.values()) / 2**20
    line = f"downloading {builder.name} ({size:.0f} MiB) to {builder.data_dir}"
    print(line, file=sys.stderr)
    try:
        builder.download_and_prepare()
    except Exception as error:  # the code of a set may raise anything
        rule = f"cannot be prepared in {builder.data_dir} ({first_line(error)}); {ADVICE}"
        raise InputError("data.source", source, rule) from error


def _why_unreachable(url: str) -> str | None:
    """Sends a HEAD request to `url`, for at most `PROBE_SEC`.

    Returns:
      Why the host cannot be reached; None if it sent any answer.
    """
    reason: str | None = f"no answer within {PROBE_SEC:g} s"

    def probe() -> None:
        nonlocal reason
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request):
                reason = None
        except urllib.error.HTTPError as error:  # a refusal is an answer
            error.close()
            reason = None
        except Exception as error:
            cause = getattr(error, "reason", error)
            # TFDS trusts other certificates than Python does, so it may succeed.
            reason = None if isinstance(cause, ssl.SSLError) else str(cause)

    # The timeout of urlopen would not cover the name look-up.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SEC)
    return reason
