"""The `tfds:<name>` source: image classification sets of TensorFlow Datasets.

Prepared data is read where it lies, and downloaded otherwise. Left to itself TFDS retries a dead
network for minutes without a word, so the host is asked for a sign of life first.
"""

import contextlib
import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from PIL import Image

from hjepa_jax.data.base import Source, SourceInfo, Split, as_rgb, square, streams
from hjepa_jax.data.records import NOT_STREAMED, Streaming
from hjepa_jax.data.test_split import hold_out_test, num_held_out
from hjepa_jax.data.tfds_info import TEST_SPLITS, formats_of, made_from, splits_line
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.runtime.user_cache import kept_arrays

SMALL_DOWNLOAD_BYTES = 2**28  # decoded, images of such a download fit the memory in any case
PROBE_SEC = 5.0  # how long the host of a download may take to answer
READ_BATCH = 1000  # images that TensorFlow hands over at a time
ADVICE = (
    "point --config.data.dir to a folder where TFDS has prepared it, or train without any "
    "download: --config=configs/shapes_tiny.py"
)


def open_tfds(
    source: str,
    name: str,
    data_dir: str | None,
    image_size: int,
    streaming: Streaming = NOT_STREAMED,
    may_download: bool = True,
) -> Source:
    """Opens `tfds:<name>`; see `hjepa_jax.data.sources.open_source`."""
    try:
        import tensorflow_datasets as tfds  # does not import TensorFlow yet
        from tensorflow_datasets.core.utils import gcs_utils

        # Older releases look for the set in a Google bucket first: minutes, without a network.
        gcs_utils._is_gcs_disabled = True
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # no such set, or what is prepared of it is damaged
        raise InputError("data.source", source, first_line(error)) from error
    if not builder.data_path.exists():  # is_prepared() would log a warning
        if not may_download:
            rule = f"is not in {builder.data_dir}, and nothing is downloaded here; {ADVICE}"
            raise InputError("data.source", source, rule)
        if _may_be_streamed(streaming, builder):
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        _download(source, builder)

    info: Any = builder.info
    splits, features = info.splits, dict(info.features)
    keys = info.supervised_keys or ()
    kinds = [type(features.get(key)) for key in keys]
    if kinds != [tfds.features.Image, tfds.features.ClassLabel] or "train" not in splits:
        rule = "must be an image classification set: an image, a class label and a split train"
        raise InputError("data.source", source, rule)
    image, label = (features[key] for key in keys)
    if image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3):
        rule = f"images must be uint8 with 1 or 3 channels, not {image.np_dtype} {image.shape}"
        raise InputError("data.source", source, rule)

    shape = (*image.shape[:2], 3) if None not in image.shape else (image_size, image_size, 3)
    test_name = next((name for name in TEST_SPLITS if name in splits), None)
    train_name = streaming.train_split or "train"
    if train_name not in splits:
        rule = f"must be a split of {source}: {', '.join(splits)}"
        raise InputError("data.train_split", train_name, rule)
    if streams(streaming, splits[train_name].num_examples, shape):
        from hjepa_jax.data import tfds_records

        return tfds_records.open_streamed(source, builder, shape, streaming)

    def load() -> tuple[Split, Split]:
        def decode() -> dict[str, np.ndarray]:
            names = ["train"] if test_name is None else ["train", test_name]
            splits = {name: _read_split(source, builder, name, shape) for name in names}
            return {
                f"{name}_{kind}": array
                for name, split in splits.items()
                for kind, array in (("images", split.images), ("labels", split.labels))
            }

        key = f"{builder.info.full_name} {shape} {builder.data_path}"
        arrays = kept_arrays(key, decode, made_from=made_from(builder))
        train = Split(arrays["train_images"], arrays["train_labels"])
        if test_name is None:
            return hold_out_test(source, train)
        return train, Split(arrays[f"{test_name}_images"], arrays[f"{test_name}_labels"])

    num_train = splits["train"].num_examples
    num_test = splits[test_name].num_examples if test_name else num_held_out(source, num_train)
    num_train -= 0 if test_name else num_test
    usage = splits_line(
        source, builder, ("train", test_name), num_train, num_test, class_names=label.names
    )
    info = SourceInfo(num_train, num_test, shape, tuple(label.names))
    return Source(source, info, load, usage=usage)


def _may_be_streamed(streaming: Streaming, builder: Any) -> bool:
    """Whether a set is to be prepared so that it can be; how much there is of it is known later."""
    size = sum(info.size for info in (builder.url_infos or {}).values() if info)
    return streaming.when == "always" or (
        streaming.when == "auto" and not 0 < size < SMALL_DOWNLOAD_BYTES
    )


def _read_split(source: str, builder: Any, name: str, shape: tuple[int, int, int]) -> Split:
    """Decodes one split, in the order of its files.

    Raises:
      InputError: images are without labels, or one cannot be read.
    """
    try:
        split = _decode_split(source, builder, name, shape)
    except InputError:
        raise
    except Exception as error:  # TensorFlow's own, of damaged files; or it is not installed
        rule = f"split {name} in {builder.data_path} cannot be read: {first_line(error)}"
        raise InputError("data.source", source, rule) from error
    if split.labels.min() < 0:
        raise InputError("data.source", source, f"split {name} has images without a label")
    return split


def _decode_split(source: str, builder: Any, name: str, shape: tuple[int, int, int]) -> Split:
    if formats_of(builder) == {"array_record"}:  # TensorFlow cannot read that
        from hjepa_jax.data import tfds_records

        return tfds_records.read_split(source, builder, name, shape)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no chatter about the CPU's abilities
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    with contextlib.suppress(RuntimeError):  # TensorFlow runs already, as its owner set it up
        tf.config.set_visible_devices([], "GPU")
    options = tf.data.Options()
    options.autotune.enabled = False  # the tuning outlasts the reading
    read_config = tfds.ReadConfig(
        options=options,
        interleave_cycle_length=1,  # shards one after the other: the order of the files
        try_autocache=False,
        num_parallel_calls_for_decode=8,
    )
    image_key, _ = builder.info.supervised_keys
    one_size = None not in builder.info.features[image_key].shape
    dataset = builder.as_dataset(
        split=name,
        batch_size=READ_BATCH if one_size else None,
        as_supervised=True,
        read_config=read_config,
    )
    num_examples = builder.info.splits[name].num_examples
    images = np.empty((num_examples, *shape), np.uint8)
    labels = np.empty(num_examples, np.int32)
    start = 0
    for image, label in dataset.as_numpy_iterator():
        if not one_size:
            image = square(Image.fromarray(as_rgb(image[None])[0]), shape[0])[None]
        stop = start + len(image)
        images[start:stop] = image  # grey values broadcast to three channels
        labels[start:stop] = label
        start = stop
    return Split(images, labels)


def _download(source: str, builder: Any) -> None:
    """Downloads and prepares a set, with progress on stderr."""
    url_infos = {url: info for url, info in (builder.url_infos or {}).items() if url[:4] == "http"}
    for url in list(url_infos)[:1]:
        if reason := _why_unreachable(url):
            rule = f"is not in {builder.data_dir} and {url} cannot be reached ({reason}); {ADVICE}"
            raise InputError("data.source", source, rule)
    size = sum(info.size for info in url_infos.values())
    print(
        f"downloading {builder.name} ({size / 2**20:.0f} MiB) to {builder.data_dir}",
        file=sys.stderr,
    )
    try:
        builder.download_and_prepare()
    except Exception as error:  # each data set brings its own code, and errors
        rule = f"cannot be prepared in {builder.data_dir} ({first_line(error)}); {ADVICE}"
        raise InputError("data.source", source, rule) from error


def _why_unreachable(url: str) -> str | None:
    """Asks for the head of `url` and gives up after `PROBE_SEC`, name look-up and proxy included.

    Returns:
      The reason in words, or None where anything at all answered.
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
            # TFDS trusts other certificates than Python does: let it try.
            reason = None if isinstance(cause, ssl.SSLError) else str(cause)

    # No timeout of urlopen's own: it would not hold for the name look-up.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SEC)
    return reason
