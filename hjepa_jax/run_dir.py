"""The directory of a run: whose it is, whether it can be written, and who is in it."""

import contextlib
import datetime
import json
import os
import pathlib
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from hjepa_jax.build import build_schedules
from hjepa_jax.config import (
    ADDED_FIELDS,
    FREE_FIELDS,
    REMOVED_FIELDS,
    SCHEDULE_FIELDS,
    Config,
    base_config,
    differing_fields,
)
from hjepa_jax.data.sources import first_line
from hjepa_jax.errors import InputError
from hjepa_jax.fields import flatten
from hjepa_jax.validation import validate
from hjepa_jax.whole_files import fcntl, replacing

# Size of a file that is written and deleted to see whether the workdir can be written.
PROBE_BYTES = 2**16


def check_workdir(config: Config, workdir: pathlib.Path, *, num_images: int | None = None) -> None:
    """Refuses a directory in which this run cannot be; changes nothing.

    Args:
      config: of the run.
      workdir: its directory.
      num_images: of its training set. Where it is not known yet, length and schedules are not
        compared with those of the run that is there.

    Raises:
      InputError: when it holds a run whose config differs in a field that matters, or could not be
        made or written.
    """
    with writing(workdir):
        if (workdir / "config.json").exists():
            _check_same_run(load_config(workdir), config, workdir, num_images)
        there = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
        # What access rights promise, disks and quotas may refuse, some only at the first byte.
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(PROBE_BYTES))


def prepare_workdir(config: Config, workdir: pathlib.Path, num_images: int) -> None:
    """Makes the run's directory and writes config.json into it: how the run goes on from here.

    Raises:
      InputError: see `check_workdir`; nothing is changed then.
    """
    check_workdir(config, workdir, num_images=num_images)
    path = workdir / "config.json"
    if path.exists():
        old = load_config(workdir)
        if old.to_dict() == config.to_dict():
            return
        if changes := _changes(old, config):
            print(f"goes on with {changes}", flush=True)
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((json.dumps(config.to_dict(), indent=2) + "\n").encode())


@contextlib.contextmanager
def writing(directory: pathlib.Path, field: str = "--workdir") -> Iterator[None]:
    """Turns an error of the file system within the block into an InputError of that field."""
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more: not the directory's fault
        raise
    except OSError as error:
        rule = f"must be a directory that can be written ({error.strerror or first_line(error)})"
        raise InputError(field, str(directory), rule) from error


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this process: two runs in one directory would spoil each other.

    The lock is the operating system's, on the file `lock`, so that it ends with the process however
    that ends; the file says who holds it. Where there are no such locks (Windows,
    some network file systems), nothing is held. The workdir is made if need be.

    Raises:
      InputError: when another live process holds it, or it cannot be written ("--workdir").
    """
    if fcntl is None:
        yield
        return
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a+b", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "another process"
            rule = f"is in use by {owner}; stop that run or choose another --workdir"
            raise InputError("--workdir", str(workdir), rule) from error
        except OSError:
            pass  # a file system without such locks
        started = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {started}"
        with writing(workdir):  # the disk may be full
            file.truncate(0)
            file.write(owner.encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the lock ends with the file, whatever is in it
                file.truncate(0)


def lock_owner(workdir: pathlib.Path) -> str:
    """Which other process holds the workdir, see `locked`; empty where none does."""
    path = workdir / "lock"
    if fcntl is None or not path.exists():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = file.read().strip() or "another process"
            return "" if owner.startswith(f"process {os.getpid()} ") else owner
        except OSError:  # a file system without such locks
            return ""
    return ""


def _check_same_run(
    old: Config, new: Config, workdir: pathlib.Path, num_images: int | None
) -> None:
    differing, why = differing_fields(old.to_dict(), new.to_dict()), ""
    if not differing:
        return
    if set(differing) <= set(SCHEDULE_FIELDS):
        if num_images is not None:
            why = _another_past(old, new, max(checkpoint_sizes(workdir), default=0), num_images)
        if not why:
            return
    rule = f"holds a run of another config ({_changes(old, new)}){why}; choose another --workdir"
    raise InputError("--workdir", str(workdir), rule)


def _changes(old: Config, new: Config) -> str:
    was, now = flatten(old.to_dict()), flatten(new.to_dict())
    differing = differing_fields(old.to_dict(), new.to_dict())
    return ", ".join(f"{f} {was.get(f)!r} -> {now.get(f)!r}" for f in differing)


def _another_past(old: Config, new: Config, num_updates: int, num_images: int) -> str:
    """What `new` would have done otherwise in the first updates; empty where nothing."""
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


def checkpoint_sizes(workdir: pathlib.Path) -> dict[int, int]:
    """Bytes on disk of each checkpoint of a run, by its step."""
    sizes = {}
    for folder in (workdir / "checkpoints").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # a run that goes on may delete the oldest
            if folder.name.isdecimal():
                files = [f for f in folder.rglob("*") if f.is_file()]
                sizes[int(folder.name)] = sum(f.stat().st_size for f in files)
    return dict(sorted(sizes.items()))


def load_config(workdir: str | pathlib.Path) -> Config:
    """The config of the run in `workdir`, locked and checked.

    Raises:
      InputError: when there is none, or it is not one of this version.
    """
    path = pathlib.Path(workdir) / "config.json"
    config = base_config().lock()
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        config.update(_of_this_version(saved, config.to_dict()))
        validate(config)
    except (FileNotFoundError, NotADirectoryError) as error:
        rule = "holds no run (there is no config.json)"
        raise InputError("--workdir", str(workdir), rule) from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError,
            InputError) as error:  # fmt: skip
        rule = f"its config.json is no config of this version: {first_line(error)}"
        raise InputError("--workdir", str(workdir), rule) from error
    return config


def _of_this_version(saved: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """A run is described by all fields: what another version lacks is known, or not guessed."""
    if not isinstance(saved, dict):
        raise TypeError("not an object")
    kept = _without_removed(saved)
    found, expected = flatten(kept).keys(), flatten(defaults).keys()
    missing = expected - found - {*ADDED_FIELDS}
    missing = [field for field in missing if not field.startswith(FREE_FIELDS)]
    for which, fields in (("unknown", found - expected), ("missing", missing)):
        if fields:
            raise ValueError(f"{which} {', '.join(sorted(fields))}")
    return kept


def _without_removed(saved: dict[str, Any]) -> dict[str, Any]:
    """The config of an older version without the fields that are gone, where they did nothing."""
    kept = dict(saved)
    for field, off in REMOVED_FIELDS.items():
        group, name = field.split(".")
        fields = kept.get(group)
        if isinstance(fields, dict) and fields.get(name) == off:
            kept[group] = {other: value for other, value in fields.items() if other != name}
    return kept
