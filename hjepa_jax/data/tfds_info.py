"""Facts about a prepared TFDS set: splits, formats, files."""

import os
from collections.abc import Sequence
from typing import Any

from hjepa_jax.data.usage import Unused, usage_line
from hjepa_jax.runtime.backend import version
from hjepa_jax.runtime.provenance import source_digest


def image_and_label(builder: Any) -> tuple[str, str | None]:
    """Returns the names of the image feature and of the label feature; None without classes.

    Raises:
      ValueError: the set has no image, or several.
    """
    import tensorflow_datasets as tfds

    features = dict(builder.info.features)
    keys: Any = builder.info.supervised_keys or ()
    kinds = [type(features.get(key)) for key in keys]
    if kinds == [tfds.features.Image, tfds.features.ClassLabel]:
        return keys
    (image,) = (name for name, each in features.items() if type(each) is tfds.features.Image)
    return image, None


def class_names(builder: Any) -> tuple[str, ...]:
    """Returns the names of the classes; empty without a label feature."""
    _, label = image_and_label(builder)
    return tuple(builder.info.features[label].names) if label else ()


def test_splits(builder: Any) -> list[str]:
    """Returns the splits that may hold the test images; the first one with labels is used."""
    return [name for name in ("test", "validation") if name in builder.info.splits]


def splits_line(
    source: str,
    builder: Any,
    used: Sequence[str | None],
    num_train: int,
    num_test: int,
    *,
    class_names: Sequence[str],
) -> str:
    """Returns a line that names the training split, the test split, and the unused splits."""
    train, test, *_ = used
    others = [name for name in builder.info.splits if name not in used]
    return usage_line(
        source,
        f"{num_train} images in split {train}",
        f"{num_test} images " + (f"in split {test}" if test else held_out(class_names)),
        class_names,
        [Unused(name, "other splits") for name in others],
    )


def held_out(class_names: Sequence[str]) -> str:
    """Returns how test images are chosen if no split has them."""
    return "held out, by class" if class_names else "held out"


def formats_of(builder: Any) -> set[str]:
    """Returns the formats in which a set is prepared: tfrecord, array_record ..."""
    return {found.value for found in builder.info.available_file_formats()}


def made_from(builder: Any) -> str:
    """Returns everything that decoded data depends on: files of the set, our code, decoders."""
    decoders = [version(package) for package in ("pillow", "tensorflow", "tensorflow-datasets")]
    return f"{files_of(builder.data_path)} {source_digest('data')} {decoders}"


def files_of(folder: Any) -> list[tuple[str, int, int, int]]:
    """Returns name, bytes, modification time (ns) and status change time (ns) of each file.

    The status change time shows every write, even if the modification time is set back afterwards.
    """
    stats = ((path.name, os.stat(path)) for path in folder.iterdir())
    return sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)
