"""The classifier that a fine-tuning leaves in the work directory, for `Encoder.predict`."""

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


def write_classifier(workdir: pathlib.Path, params: Any, class_names: Sequence[str]) -> None:
    """Writes the parameters of a `Classifier`, in place of an earlier one.

    Args:
      workdir: the work directory.
      params: the parameters.
      class_names: names of the classes, in the order of the logits.
    """
    tensors: dict[str, Any] = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    with replacing(workdir / FILE_NAME) as file:
        np.savez(file, allow_pickle=False, class_names=np.array(class_names), **tensors)


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
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        rule = f"has a damaged {FILE_NAME}: {error}"
        raise InputError("workdir", str(workdir), rule) from error
    return traverse_util.unflatten_dict(tensors, sep="/"), names
