"""Decides whether a config may resume the run in a work directory."""

import dataclasses
import os.path
import shlex
from typing import Any

import numpy as np

from hjepa_jax.config.build import build_schedules
from hjepa_jax.config.defaults import SCHEDULE_FIELDS, Config, differing_fields
from hjepa_jax.config.fields import flatten
from hjepa_jax.data.fingerprint import other_content, same_content, why_redrawn
from hjepa_jax.runs.record import RunRecord

# Fields that name files. The fingerprint of the images decides whether the data is the same.
DATA_PATHS = ("data.source", "data.class_list")


@dataclasses.dataclass(frozen=True)
class Saved:
    """Facts of the newest intact checkpoint.

    Attributes:
      step: its step.
      config: the config that made it, as plain JSON.
      fingerprint: fingerprint of the training images; None if unknown.
    """

    step: int
    config: Any
    fingerprint: str | None


@dataclasses.dataclass(frozen=True)
class Past:
    """Facts of the run in a work directory that decide how it may resume.

    Attributes:
      config: the config that trained it.
      num_updates: step of its newest checkpoint; 0 without one.
      record: its run.json; None if there is no valid one.
      fingerprint: fingerprint of its training images; None if unknown.
    """

    config: Config
    num_updates: int
    record: RunRecord | None
    fingerprint: str | None


def why_not(past: Past, config: Config, workdir: str, data: RunRecord | None) -> str:
    """Returns the rule that forbids `config` to resume the run; "" if it may.

    Args:
      past: the run.
      config: the config to resume with.
      workdir: its directory, for the advice.
      data: facts of the data as it is now. None before it is loaded: the length of the run,
        schedules and moved paths are not compared in that case.
    """
    differing = set(differing_fields(past.config, config))
    if not past.num_updates:  # the statistics may come from images that have changed since
        differing -= {"data.mean", "data.std"}
    if _same_path(past.config.train.init_from, config.train.init_from):
        differing.discard("train.init_from")
    moved = {field for field in differing & {*DATA_PATHS} if _may_be_moved(past, config, field)}
    if differing - moved - {*SCHEDULE_FIELDS}:
        return _of_another_config(past, config, "")
    if data is None:
        return ""
    if past.num_updates and (
        rule := why_redrawn(config.data.source, past.fingerprint, data.fingerprint)
    ):
        return rule
    if past.record and past.num_updates and past.record.num_images != data.num_images:
        return (
            f"was trained on {past.record.num_images} images, and data.source has "
            f"{data.num_images} now: schedules and order of the images would be others; restore "
            f"the images, or choose another --workdir{_begin_from(workdir)}"
        )
    if not past.record and past.num_updates and other_content(past.fingerprint, data.fingerprint):
        return (
            f"was trained on other images (fingerprint {past.fingerprint} -> {data.fingerprint}), "
            "and no usable run.json says how many; restore the images, or choose another "
            f"--workdir{_begin_from(workdir)}"
        )
    if moved and not same_content(past.fingerprint, data.fingerprint):
        why = (
            " and training images that are not known to be the same (fingerprint "
            f"{past.fingerprint} -> {data.fingerprint})"
        )
        return _of_another_config(past, config, why)
    if differing - moved and (why := _another_past(past, config, data.num_images)):
        advice = (
            f"{_begin_from(workdir)} (a run can be made longer while its rate is constant: "
            "optim.decay_epochs=0 and a decay that begins later)"
        )
        return _of_another_config(past, config, why) + advice
    return ""


def changes(old: Config, new: Config) -> str:
    """Returns the fields in which the results of two configs may differ, with both values."""
    was, now = flatten(old.to_dict()), flatten(new.to_dict())
    return ", ".join(f"{f} {was[f]!r} -> {now[f]!r}" for f in differing_fields(old, new))


def other_networks_or_data(old: Config, new: Config) -> list[str]:
    """Returns the fields that differ and that a run may not change (schedules and paths may)."""
    may_differ = {*SCHEDULE_FIELDS, *DATA_PATHS, "train.init_from"}
    return [field for field in differing_fields(old, new) if field not in may_differ]


def _of_another_config(past: Past, config: Config, why: str) -> str:
    return f"holds a run of another config ({changes(past.config, config)}){why}; " + (
        "choose another --workdir"
    )


def _begin_from(workdir: str) -> str:
    start = f"--config.train.init_from={shlex.quote(workdir)}"
    return f", with {start} to begin with the parameters of this run"


def _same_path(one: str | None, other: str | None) -> bool:
    """Returns whether two paths, relative to the current directory, name the same file."""
    if not one or not other:
        return one == other
    one, other = (os.path.realpath(os.path.expanduser(path)) for path in (one, other))
    return one == other


def _may_be_moved(past: Past, config: Config, field: str) -> bool:
    """Returns whether the two values of a path field may name the same data."""
    _, name = field.split(".")
    old, new = past.config.data[name], config.data[name]
    if not old or not new:
        return False
    if field != "data.source":
        return True
    (kind, _, before), (other, _, now) = old.partition(":"), new.partition(":")
    if kind != other:
        return False
    if kind == "tfds":  # name/config:version
        return before.split(":")[0] == now.split(":")[0]
    return kind in ("folder", "images", "npz", "npy")


def _another_past(past: Past, new: Config, num_images: int) -> str:
    """Returns how the updates so far would differ under `new`; "" if they would not."""
    old, num_updates = past.config, past.num_updates
    was, now = (build_schedules(config, num_images) for config in (old, new))
    if num_updates > now.num_steps:
        return f", which made {num_updates} updates where this one would end after {now.num_steps}"
    updates = np.arange(1, num_updates + 1)
    averaged = ["ema_momentum"] if old.model.target == "ema" else []
    for name in ("learning_rate", "weight_decay", *averaged):
        before, after = (np.asarray(getattr(s, f"{name}_fn")(updates)) for s in (was, now))
        if (before != after).any():
            i = np.abs(before - after).argmax()
            return f", and made update {i + 1} at {name} {before[i]:.7g}, not {after[i]:.7g}"
    return ""
