"""The `meta` item of a checkpoint, and the checks of a checkpoint against it.

Orbax restores an incomplete tree or flipped bits without an error. So `meta` holds a table of all
arrays with their checksums, and a checksum of itself.
"""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

from hjepa_jax.config import Config
from hjepa_jax.config.fields import is_a
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.runs.array_table import (
    ArrayTable,
    changed,
    describe_arrays,
    differences,
    json_checksum,
)
from hjepa_jax.runs.same_run import Saved, changes, other_networks_or_data
from hjepa_jax.runs.workdir import checkpoint_sizes, parse_config
from hjepa_jax.runtime.provenance import source_commit, versions

FORMAT_VERSION = 3


class DamagedCheckpoint(Exception):
    """A checkpoint that exists but cannot be trusted; the message says why."""


def make_meta(
    config: dict[str, Any], data: str | None, scores: dict[str, float], trees: dict[str, Any]
) -> dict[str, Any]:
    """Returns the `meta` of a checkpoint.

    Args:
      config: the run's config.
      data: fingerprint of the training images.
      scores: evaluation results at this step.
      trees: the other items of the checkpoint, by name.
    """
    meta = {
        "format_version": FORMAT_VERSION,
        "config": config,
        "versions": versions(),
        "commit": source_commit(),
        "data": data,
        "scores": scores,
        "arrays": {name: describe_arrays(tree) for name, tree in trees.items()},
    }
    return {**meta, "checksum": json_checksum(meta)}


def read_meta(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns the meta of the checkpoint at `step`, as `make_meta` made it.

    Raises:
      DamagedCheckpoint: if it cannot be read, or differs from what was written.
      InputError: if it has another format ("--step").
    """
    path = workdir / "checkpoints" / str(step) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"meta cannot be read ({first_line(error)})") from error
    if not isinstance(meta, dict) or not is_a(int, meta.get("format_version")):
        raise DamagedCheckpoint("meta has no format_version")
    version, checksum = meta["format_version"], meta.pop("checksum", None)
    is_intact = checksum == json_checksum(meta)
    # Format 1 had no checksum.
    if version != FORMAT_VERSION and (is_intact or checksum is None):
        rule = f"is in format {version}; this version reads format {FORMAT_VERSION}"
        raise InputError("--step", step, rule)
    if not is_intact:
        raise DamagedCheckpoint("the checksum of meta differs")
    return meta


def no_checkpoint(workdir: pathlib.Path) -> InputError:
    """Returns the error for a work directory without a readable checkpoint."""
    return InputError("--workdir", str(workdir), "holds no checkpoint that can be read")


def read_newest_meta(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the meta of the newest checkpoint of a run.

    Raises:
      InputError: if there is no checkpoint, or the newest is damaged.
    """
    steps = checkpoint_sizes(workdir)
    if not steps:
        raise no_checkpoint(workdir)
    step = max(steps)
    try:
        return read_meta(workdir, step)
    except DamagedCheckpoint as error:
        raise InputError("--step", step, f"is damaged ({error})") from error


def read_saved(workdir: pathlib.Path) -> Saved | None:
    """Returns facts of the newest checkpoint with an intact meta; None without one.

    Args:
      workdir: the run's directory, which need not exist.

    Raises:
      InputError: if that checkpoint has another format ("--step").
    """
    for step in sorted(checkpoint_sizes(workdir), reverse=True):
        with contextlib.suppress(DamagedCheckpoint):
            meta = read_meta(workdir, step)
            return Saved(step, meta["config"], meta["data"])
    return None


def check_config(workdir: pathlib.Path, step: int, saved: Any, config: Config) -> None:
    """Refuses a checkpoint of another config, even if its arrays have the right shapes.

    Raises:
      InputError: naming the fields that differ ("--workdir"), or fields of another version.
    """
    try:
        trained = parse_config(saved)
    except ValueError as error:
        raise InputError("--step", step, f"has a config of another version: {error}") from error
    if other_networks_or_data(trained, config):
        rule = (
            f"its config differs from the config of the checkpoint at step {step} "
            f"({changes(trained, config)})"
        )
        raise InputError("--workdir", str(workdir), rule)


def check_shapes(step: int, tables: dict[str, ArrayTable], templates: dict[str, Any]) -> None:
    """Refuses a checkpoint if its arrays differ from the templates in path, type or shape.

    Raises:
      InputError: naming up to three of them ("--step").
    """
    for name, tree in templates.items():
        if found := differences(_wanted_part(tables[name], tree), tree):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            rule = f"does not fit this model: {'; '.join(found[:3])}{more}"
            raise InputError("--step", step, rule)


def check_arrays(name: str, table: ArrayTable, tree: Any) -> None:
    """Checks every bit of a tree that was read.

    Raises:
      DamagedCheckpoint: naming the first array with another checksum.
    """
    if bad := sorted(changed(_wanted_part(table, tree), describe_arrays(tree))):
        raise DamagedCheckpoint(f"the checksum of {name} {bad[0]} differs")


def missing_fields(tree: Any) -> set[str]:
    """Returns the names of the fields of a TrainState that are None; {} for any other tree."""
    if not isinstance(tree, TrainState):
        return set()
    return {field.name for field in dataclasses.fields(tree) if getattr(tree, field.name) is None}


def _wanted_part(table: ArrayTable, tree: Any) -> ArrayTable:
    """Returns the entries of a table of arrays for the fields that `tree` has."""
    missing = missing_fields(tree)
    return {path: entry for path, entry in table.items() if _field(path) not in missing}


def _field(path: str) -> str:
    """Returns the field that a path such as ".params['norm']['scale']" begins with."""
    return path.removeprefix(".").partition("[")[0].partition(".")[0]
