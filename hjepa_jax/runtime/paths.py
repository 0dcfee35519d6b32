"""Expands `~` in the paths that a user writes, and refuses web addresses."""

import pathlib
import re
from typing import Any

from hjepa_jax.errors import InputError

# Config fields that hold a path. Only data.dir may be an address (gs://), because TFDS reads it.
PATH_FIELDS = ("data.class_list", "data.dir", "train.init_from")
# Prefixes of `data.source` that are followed by a path.
PATH_SOURCES = ("folder:", "images:", "npz:", "npy:")


def local_path(field: str, value: str) -> pathlib.Path:
    """Returns `value` as a path, with `~` expanded.

    Args:
      field: flag or field that holds the value, for the error.
      value: the text of the user.

    Raises:
      InputError: if it is empty, an address such as gs://bucket, or `~name` of an unknown user.
    """
    return pathlib.Path(expanded(field, value))


def expanded(field: str, value: str) -> str:
    """Returns `value` with `~` expanded; see `local_path`."""
    if not value.strip():
        raise InputError(field, value, "must be a path, not empty")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", value):
        raise InputError(field, value, "must be a path on this machine, not an address")
    return _expand_home(field, value)


def expand_paths(config: Any) -> Any:
    """Returns a copy of a config in which `~` is expanded in every field that holds a path.

    Raises:
      InputError: see `local_path`.
    """
    config, locked = config.copy_and_resolve_references(), config.is_locked
    for field in PATH_FIELDS:
        section, name = field.split(".")
        if (value := config[section][name]) is not None:
            read_by_tfds = field == "data.dir"
            config[section][name] = (_expand_home if read_by_tfds else expanded)(field, value)
    config.data.source = expand_source("data.source", config.data.source)
    if config.eval.data is not None:
        config.eval.data = expand_source("eval.data", config.eval.data)
    return config.lock() if locked else config


def expand_source(field: str, source: str) -> str:
    """Returns a `data.source` with `~` expanded.

    Raises:
      InputError: see `local_path`.
    """
    for kind in PATH_SOURCES:
        if source.startswith(kind) and source != kind:
            try:
                return kind + expanded(field, source.removeprefix(kind))
            except InputError as error:
                raise InputError(field, source, error.rule) from error
    return source


def _expand_home(field: str, value: str) -> str:
    if not value.startswith("~"):
        return value
    try:
        return str(pathlib.Path(value).expanduser())
    except RuntimeError as error:
        raise InputError(field, value, "names the home directory of no user here") from error
