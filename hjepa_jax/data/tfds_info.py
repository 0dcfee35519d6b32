"""What TensorFlow Datasets says of a prepared set: splits, formats, files."""

import os
from collections.abc import Sequence
from typing import Any

from hjepa_jax.data.usage import Unused, usage_line
from hjepa_jax.runtime.backend import version
from hjepa_jax.runtime.provenance import source_digest

TEST_SPLITS = ("test", "validation")  # the first that there is


def splits_line(
    source: str,
    builder: Any,
    used: Sequence[str | None],
    num_train: int,
    num_test: int,
    *,
    class_names: Sequence[str],
) -> str:
    """Returns a line that names the splits for training, for the test, and those not used."""
    train, test, *_ = used
    others = [name for name in builder.info.splits if name not in used]
    return usage_line(
        source,
        f"{num_train} images in split {train}",
        f"{num_test} images " + (f"in split {test}" if test else "held out, by class"),
        class_names,
        [Unused(name, "other splits") for name in others],
    )


def formats_of(builder: Any) -> set[str]:
    """Formats in which a set is prepared: tfrecord, array_record ..."""
    return {found.value for found in builder.info.available_file_formats()}


def made_from(builder: Any) -> str:
    """All that decoded data depends on: the files of a set, our code, and the decoders."""
    decoders = [version(package) for package in ("pillow", "tensorflow", "tensorflow-datasets")]
    return f"{files_of(builder.data_path)} {source_digest('data')} {decoders}"


def files_of(folder: Any) -> list[tuple[str, int, int, int]]:
    """Name, bytes, time of last change (ns) and of last status change (ns) of each file of a set.

    The last changes with every write, even if the time of last change is set back afterwards.
    """
    stats = ((path.name, os.stat(path)) for path in folder.iterdir())
    return sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)
