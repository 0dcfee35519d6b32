"""The work directory of a run: config check, write check and lock."""

import contextlib
import datetime
import json
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

from hjepa_jax.config.defaults import REMOVED_FIELDS, Config, base_config
from hjepa_jax.config.fields import flatten
from hjepa_jax.config.validation import validate
from hjepa_jax.data.fingerprint import other_content
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.runs.record import NAME as RECORD
from hjepa_jax.runs.record import RunRecord, read_record, write_record
from hjepa_jax.runs.same_run import Past, Saved, changes, other_networks_or_data, why_not
from hjepa_jax.runs.scores import read_probe_json
from hjepa_jax.runtime.files import fcntl, replacing

# Files and folders that a start makes before its first step, all at the top of the directory.
_MADE_BY_A_START = ("checkpoints", "config.json", RECORD, "metrics.jsonl", "lock")
# Size of a file that is written and deleted to see whether the workdir can be written.
PROBE_BYTES = 2**16


def check_workdir(
    config: Config,
    workdir: pathlib.Path,
    *,
    saved: Saved | None = None,
    data: RunRecord | None = None,
) -> None:
    """Refuses a directory in which this run cannot be; changes nothing.

    The newest checkpoint says which run the directory holds. Without one, config.json does.

    Args:
      config: of the run.
      workdir: its directory.
      saved: what the newest checkpoint that can be read says; None if there is none.
      data: facts of the data as it is now; None before it is loaded. Length, schedules and moved
        paths are not compared then.

    Raises:
      InputError: if the directory holds a run whose config differs in a field that matters, or
        results whose config is not known, or could not be made or written.
    """
    with writing(workdir):
        past = _past(workdir, saved)
        if past is None:
            _refuse_results_of_unknown_origin(workdir)
        elif rule := why_not(past, config, str(workdir), data):
            raise InputError("--workdir", str(workdir), rule)
        there = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
        # What access rights promise, disks and quotas may refuse, some only at the first byte.
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(PROBE_BYTES))


def with_recorded_start(config: Config, workdir: pathlib.Path, saved: Saved | None) -> Config:
    """The config, with the `train.init_from` of the run in `workdir` if it gives none itself.

    A run that goes on does not read that field. So its command may leave it out.

    Raises:
      InputError: if the config of that run cannot be read.
    """
    past = _past(workdir, saved)
    if past is None or config.train.init_from or not past.config.train.init_from:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train.init_from = past.config.train.init_from
    return config.lock()


def prepare_workdir(
    config: Config, workdir: pathlib.Path, record: RunRecord, *, saved: Saved | None = None
) -> None:
    """Writes config.json and run.json: how the run goes on from here.

    Args:
      config: of the run, which `check_workdir` has accepted.
      workdir: its directory; made if need be.
      record: facts of the run.
      saved: what the newest checkpoint that can be read says; None if there is none.

    Raises:
      InputError: if they cannot be written ("--workdir").
    """
    path = workdir / "config.json"
    past = _past(workdir, saved)
    before = None if past is None else past.config
    if saved is not None and past is not None:
        before, note = _config_before(workdir, past.config)
        if note:
            print(f"{note}; it is written anew, as step {saved.step} was trained", flush=True)
    if before is not None and (changed := changes(before, config)):
        print(f"goes on with {changed}", flush=True)
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        if not (path.exists() and path.read_bytes() == text.encode()):
            with replacing(path) as file:
                file.write(text.encode())
        write_record(workdir, record)


def _past(workdir: pathlib.Path, saved: Saved | None) -> Past | None:
    """The run that the directory holds; None if neither a checkpoint nor config.json says.

    Raises:
      InputError: if what says so is no config of this version ("--workdir").
    """
    record = read_record(workdir)
    num_updates = max(checkpoint_sizes(workdir), default=0)
    if saved is None:
        if not (workdir / "config.json").exists():
            return None
        fingerprint = record.fingerprint if record else None
        return Past(load_config(workdir), num_updates, record, fingerprint)
    try:
        config = parse_config(saved.config)
    except UNUSABLE as error:
        rule = (
            f"the config in its checkpoint of step {saved.step} is none of this version: "
            f"{first_line(error)}"
        )
        raise InputError("--workdir", str(workdir), rule) from error
    if record and other_content(saved.fingerprint, record.fingerprint):
        record = None  # of another run, or of other images
    return Past(config, num_updates, record, saved.fingerprint)


def _config_before(workdir: pathlib.Path, trained: Config) -> tuple[Config, str]:
    """The config with which the run last went on, and what is wrong with its config.json."""
    if not (workdir / "config.json").exists():
        return trained, "config.json is missing"
    try:
        before = load_config(workdir)
    except InputError as error:
        return trained, error.rule
    if differing := other_networks_or_data(trained, before):
        return trained, f"config.json is of another config ({', '.join(differing)})"
    return before, ""


def _refuse_results_of_unknown_origin(workdir: pathlib.Path) -> None:
    """A run that starts anew would replace them or add to them."""
    metrics, found = workdir / "metrics.jsonl", []
    if metrics.exists() and metrics.stat().st_size:
        found.append("metrics.jsonl")
    if read_probe_json(workdir / "probe.json"):
        found.append("probe.json")
    if checkpoint_sizes(workdir):
        found.append("checkpoints")
    if found:
        rule = (
            f"holds {', '.join(found)} of a run, but neither config.json nor a checkpoint that can "
            "be read says of which; move them away or choose another --workdir"
        )
        raise InputError("--workdir", str(workdir), rule)


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
def claimed(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Holds the workdir, see `locked`. A start that fails leaves nothing behind.

    Yields:
      A function to call when the start has succeeded. If the block ends by an error before that,
      what it made is removed: the directory itself, config.json, an empty folder `checkpoints`.

    Raises:
      InputError: see `locked`.
    """
    with writing(workdir):
        missing = [f for f in (workdir, *workdir.absolute().parents) if not f.exists()]
        there = {"lock"} if (workdir / "lock").exists() else set()
    with locked(workdir):
        there |= {path.name for path in workdir.iterdir()} - {"lock"}
        started = []
        try:
            yield lambda: started.append(True)
        except BaseException:
            if not started:
                _remove_start(workdir, there, missing)
            raise


def _remove_start(workdir: pathlib.Path, there: set[str], missing: list[pathlib.Path]) -> None:
    """Removes what a failed start made: of `_MADE_BY_A_START` what was not `there` before."""
    for name in _MADE_BY_A_START:
        path = workdir / name
        if name in there:
            continue
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif not checkpoint_sizes(workdir):
            shutil.rmtree(path, ignore_errors=True)
    for folder in missing:
        with contextlib.suppress(OSError):  # it is not empty: something else is in it
            folder.rmdir()


def is_claimed(workdir: pathlib.Path) -> bool:
    """Whether another process of this run, which has claimed the directory, sees the same one."""
    with writing(workdir):
        return workdir.is_dir() if fcntl is None else (workdir / "lock").exists()


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this process: two runs in one directory would spoil each other.

    The lock is the operating system's, on the file `lock`, so that it ends with the process however
    that ends; the file says who holds it. Where there are no such locks (Windows,
    some network file systems), nothing is held. The workdir is made if need be.

    Raises:
      InputError: when another live process holds it, or it cannot be written ("--workdir").
    """
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with _lock_file(workdir) as file:
        started = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {started}"
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            file.truncate(0)
            os.write(file.fileno(), owner.encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _lock_file(workdir: pathlib.Path) -> IO[bytes]:
    """The file `lock`, open and locked.

    Raises:
      InputError: see `locked`.
    """
    path = workdir / "lock"
    while True:
        with writing(workdir):
            file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "another process"
            file.close()
            rule = f"is in use by {owner}; stop that run or choose another --workdir"
            raise InputError("--workdir", str(workdir), rule) from error
        except OSError:
            return file  # a file system without such locks
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # another start failed meanwhile, and removed it


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
    try:
        return parse_config(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError) as error:
        rule = "holds no run (there is no config.json)"
        if checkpoint_sizes(pathlib.Path(workdir)):
            rule = "has no config.json; its training command, run again, writes it anew"
        raise InputError("--workdir", str(workdir), rule) from error
    except UNUSABLE as error:
        rule = f"its config.json is no config of this version: {first_line(error)}"
        raise InputError("--workdir", str(workdir), rule) from error


# Errors of reading and parsing a config that is damaged or of another version.
UNUSABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, InputError,
)  # fmt: skip


def parse_config(saved: Any) -> Config:
    """The locked and checked config that plain JSON describes; raises one of `UNUSABLE`."""
    config = base_config().lock()
    config.update(_of_this_version(saved, config.to_dict()))
    validate(config)
    return config


def _of_this_version(saved: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json: those that it lacks take their defaults, none is unknown."""
    if not isinstance(saved, dict):
        raise TypeError("not an object")
    kept = _without_removed(saved)
    if unknown := flatten(kept).keys() - flatten(defaults).keys():
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
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
