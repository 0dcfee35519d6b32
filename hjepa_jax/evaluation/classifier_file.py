"""The file of the fine-tuned classifier in the work directory, for `Encoder.predict`."""

import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from hjepa_jax.errors import InputError
from hjepa_jax.runtime.files import replacing

FILE_NAME = "classifier.npz"


def write_classifier(
    workdir: pathlib.Path, params: Any, class_names: Sequence[str], made_from: str
) -> None:
    """Writes the parameters of a `Classifier`; replaces an earlier one.

    Args:
      workdir: the work directory.
      params: the parameters.
      class_names: names of the classes, in the order of the logits.
      made_from: digest of everything that the fine-tuning depends on.
    """
    tensors: dict[str, Any] = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    with replacing(workdir / FILE_NAME) as file:
        np.savez(file, allow_pickle=False, **_about(class_names, made_from), **tensors)


def _about(class_names: Sequence[str], made_from: str) -> dict[str, Any]:
    return {"class_names": np.array(class_names), "made_from": np.array(made_from)}


def is_kept(workdir: pathlib.Path, class_names: Sequence[str], made_from: str) -> bool:
    """Returns whether the work directory holds the classifier of this fine-tuning."""
    try:
        with (workdir / FILE_NAME).open("rb") as file, np.load(file) as arrays:
            about = _about(class_names, made_from)
            return all(np.array_equal(arrays[name], value) for name, value in about.items())
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def read_classifier(workdir: pathlib.Path) -> tuple[Any, list[str]]:
    """Returns the parameters of the classifier, and the names of its classes.

    Raises:
      InputError: if the run was not fine-tuned, or the file is damaged ("workdir").
    """
    path = workdir / FILE_NAME
    if not path.is_file():
        rule = "holds no classifier; `hjepa probe --protocols=finetune` trains and keeps one"
        raise InputError("workdir", str(workdir), rule)
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            tensors = dict(arrays)
        names = tensors.pop("class_names").tolist()
        tensors.pop("made_from", None)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        rule = f"has a damaged {FILE_NAME}: {error}"
        raise InputError("workdir", str(workdir), rule) from error
    return traverse_util.unflatten_dict(tensors, sep="/"), names
