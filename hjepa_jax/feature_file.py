"""Writes the features of an image folder or a .npz file to a file; see `hjepa_jax.embed`."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import numpy as np

from hjepa_jax import api
from hjepa_jax.api import Encoder
from hjepa_jax.config import Config, build
from hjepa_jax.data.base import Source
from hjepa_jax.data.given import GivenImages
from hjepa_jax.data.records import Labelled, report_skipped
from hjepa_jax.data.sources import open_source
from hjepa_jax.data.test_split import draw_test_rows
from hjepa_jax.errors import InputError
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.runtime.backend import select_platform
from hjepa_jax.runtime.files import replacing
from hjepa_jax.runtime.paths import local_path


def write_features(
    workdir: str, source: str, output: str, *, step: str = "last", platform: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Embeds all images of `source` and writes the features to `output`.

    Args:
      workdir: the run's directory.
      source: a folder of images or a .npz file.
      output: the .npz file to write; checked before any work.
      step: which checkpoint: "last", "best" (by k-NN) or a number.
      platform: backend to use; None = the run's.

    Returns:
      The shapes of the arrays in the file, by name.

    Raises:
      InputError: if a path cannot be read or written ("--input", "--output"), or the folder holds
        no run or no such checkpoint.
    """
    path, kind = _input_path(source)
    target = _output_path(output, path)
    folder = local_path("--workdir", workdir)
    config = load_config(folder)
    select_platform(platform or config.platform)
    images = _open(f"{kind}:{path}", config, source)
    arrays = _embed(api.load(folder, step), images)
    _write(output, target, arrays)
    return {name: array.shape for name, array in arrays.items()}


def _input_path(value: str) -> tuple[pathlib.Path, str]:
    """Returns the input and its kind, "folder" or "npz"."""
    path = local_path("--input", value)
    if path.is_dir():
        return path, "folder"
    if path.is_file() and path.suffix.lower() == ".npz":
        return path, "npz"
    found = "this is another file" if path.exists() else "there is no such file"
    raise InputError("--input", value, f"must be a folder of images or a .npz file; {found}")


def _output_path(value: str, source: pathlib.Path) -> pathlib.Path:
    """Returns the path of the output, after a check that it can be written."""
    path = local_path("--output", value)
    if path.suffix.lower() != ".npz":
        raise InputError("--output", value, "must end in .npz, the format that is written")
    if path.is_dir():
        raise InputError("--output", value, "must be a file, this is a folder")
    if path.exists() and path.samefile(source):
        raise InputError("--output", value, "must be another file than --input")
    try:
        with tempfile.TemporaryFile(dir=path.parent):  # access rights alone are not enough
            pass
    except OSError as error:
        raise _not_writable(value, error) from error
    return path


def _not_writable(value: str, error: OSError) -> InputError:
    rule = f"must be a file that can be written ({error.strerror})"
    return InputError("--output", value, rule)


def _open(source: str, config: Config, value: str) -> Source:
    """Opens the input like a run of this config, so that the test images are the same."""
    when = (
        "always" if config.data.streaming == "always" and source.startswith("folder:") else "auto"
    )
    streaming = dataclasses.replace(
        build.build_streaming(config), when=when, train_split=None, class_list=None
    )
    try:
        return open_source(
            source,
            data_dir=None,
            image_size=config.data.image_size,
            seed=config.seed,
            streaming=streaming,
        )
    except InputError as error:
        where = "" if error.value == source else f"{error.value} "
        raise InputError("--input", value, where + error.rule) from error


def _embed(encoder: Encoder, source: Source) -> dict[str, np.ndarray]:
    """Returns the arrays of the output, by name."""
    parts = source.parts or tuple(
        Labelled(GivenImages(split.images, encoder.image_size), split.labels, split.names)
        for split in source.load()
    )
    found, skipped = [], []
    for part in parts:
        features, rows, errors = encoder.embed_records(part.images, what="features")
        skipped += errors
        if not len(rows):
            raise InputError("--input", source.name, f"no image can be read: {errors[0]}")
        found.append(features | {"labels": part.labels[rows]})
        if part.names:
            found[-1]["files"] = np.array(part.names)[rows]
    report_skipped(source.name, skipped, f"{sum(len(part.labels) for part in parts)} files")
    if len(found) == 1:
        found = _hold_out(source.name, found[0])
    return {
        f"{split}_{name}": array
        for split, arrays in zip(("train", "test"), found, strict=True)
        for name, array in arrays.items()
    }


def _hold_out(source: str, arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits rows into train and test, like a run that trains on these images."""
    splits = draw_test_rows(source, arrays["labels"])
    return [{name: array[rows] for name, array in arrays.items()} for rows in splits]


def _write(value: str, path: pathlib.Path, arrays: dict[str, Any]) -> None:
    try:
        with replacing(path) as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise _not_writable(value, error) from error
