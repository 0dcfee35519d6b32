"""The work directory of a run: its config, and whether a run may start or resume in it."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from hjepa_jax.config.defaults import (
    ADDED_FIELDS,
    AUTO,
    REMOVED_FIELDS,
    Config,
    base_config,
)
from hjepa_jax.config.fields import flatten
from hjepa_jax.config.validation import validate
from hjepa_jax.data.fingerprint import other_content
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.runs.record import RunRecord, read_record, write_record
from hjepa_jax.runs.same_run import Past, Saved, changes, other_networks_or_data, why_not
from hjepa_jax.runs.scores import read_probe_json
from hjepa_jax.runtime.files import replacing

# Size of a temporary file that tests whether the work directory can be written.
PROBE_BYTES = 2**16


def check_workdir(
    config: Config,
    workdir: pathlib.Path,
    *,
    saved: Saved | None = None,
    data: RunRecord | None = None,
) -> None:
    """Refuses a directory in which this run cannot start or resume; changes nothing.

    The newest checkpoint decides which run the directory holds; without a checkpoint, config.json.

    Args:
      config: the run's config.
      workdir: its directory.
      saved: facts of the newest intact checkpoint; None if there is none.
      data: facts of the data as it is now. None before it is loaded: the length of the run,
        schedules and moved paths are not compared in that case.

    Raises:
      InputError: if the directory holds a run that differs in a field that matters, or results of
        an unknown config, or if it cannot be made or written.
    """
    with writing(workdir):
        past = _past(workdir, saved)
        if past is None:
            _refuse_results_of_unknown_origin(workdir)
        elif rule := why_not(past, config, str(workdir), data):
            raise InputError("--workdir", str(workdir), rule)
        folders = (workdir, *workdir.absolute().parents)
        existing = next(folder for folder in folders if folder.exists())
        # Access rights are not enough: some disks and quotas refuse only the first byte.
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(PROBE_BYTES))


def with_recorded_start(config: Config, workdir: pathlib.Path, saved: Saved | None) -> Config:
    """Returns the config, completed by values of the run in `workdir`.

    These values need not be repeated on the command line: `train.init_from`, statistics that were
    computed from the images (`AUTO`), and fields that an older version did not have.

    Raises:
      InputError: if the config of that run cannot be read.
    """
    past = _past(workdir, saved)
    if past is None:
        return config
    config = config.copy_and_resolve_references()
    recorded = saved.config if saved else json.loads((workdir / "config.json").read_text("utf-8"))
    with config.unlocked():
        given, usual = flatten(config.to_dict()), flatten(base_config().to_dict())
        for field in ADDED_FIELDS.keys() - flatten(recorded).keys():
            if given[field] == usual[field]:  # not set by the user
                config.update_from_flattened_dict({field: ADDED_FIELDS[field]})
        config.train.init_from = config.train.init_from or past.config.train.init_from
        for name in ("mean", "std"):
            if config.data[name] == AUTO and past.num_updates:
                config.data[name] = past.config.data[name]
    return config.lock()


def prepare_workdir(
    config: Config, workdir: pathlib.Path, record: RunRecord, *, saved: Saved | None = None
) -> None:
    """Writes config.json and run.json for a run that starts or resumes.

    Args:
      config: a config that `check_workdir` has accepted.
      workdir: its directory; made if it is missing.
      record: facts of the run.
      saved: facts of the newest intact checkpoint; None if there is none.

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
    """Returns the run that the directory holds; None without a checkpoint and config.json.

    Raises:
      InputError: if its config is not a config of this version ("--workdir").
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
    except ValueError as error:
        rule = f"the config in its checkpoint of step {saved.step} is none of this version: {error}"
        raise InputError("--workdir", str(workdir), rule) from error
    if record and other_content(saved.fingerprint, record.fingerprint):
        record = None  # it belongs to another run or to other images
    return Past(config, num_updates, record, saved.fingerprint)


def _config_before(workdir: pathlib.Path, trained: Config) -> tuple[Config, str]:
    """Returns the config of the last start, and the error of config.json; "" if it has none."""
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
    """Refuses results without a config, which a new run would replace or append to."""
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


def report_is_up_to_date(workdir: pathlib.Path) -> bool:
    """Returns whether the report is newer than all files that it is made from."""
    names = ("metrics.jsonl", "probe.json", "config.json", "run.json", "checkpoints")
    sources = [path for name in names if (path := workdir / name).exists()]
    newest = max(path.stat().st_mtime_ns for path in sources)
    report = workdir / "report.html"
    return report.exists() and report.stat().st_mtime_ns > newest


@contextlib.contextmanager
def writing(directory: pathlib.Path, field: str = "--workdir") -> Iterator[None]:
    """Turns an error of the file system inside the block into an InputError of `field`."""
    try:
        yield
    except BrokenPipeError:  # the reader of stdout is gone: not an error of the directory
        raise
    except OSError as error:
        rule = f"must be a directory that can be written ({error.strerror or first_line(error)})"
        raise InputError(field, str(directory), rule) from error


def checkpoint_sizes(workdir: pathlib.Path) -> dict[int, int]:
    """Returns the bytes on disk of each checkpoint of a run, by its step."""
    sizes = {}
    for folder in (workdir / "checkpoints").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # a run in progress may delete the oldest
            if folder.name.isdecimal():
                files = [f for f in folder.rglob("*") if f.is_file()]
                sizes[int(folder.name)] = sum(f.stat().st_size for f in files)
    return dict(sorted(sizes.items()))


def load_config(workdir: str | pathlib.Path) -> Config:
    """Returns the config of the run in `workdir`, locked and checked.

    Raises:
      InputError: if there is none, or it is not a config of this version.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        return parse_config(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError) as error:
        rule = "holds no run (there is no config.json)"
        if checkpoint_sizes(pathlib.Path(workdir)):
            rule = "has no config.json; its training command, run again, writes it anew"
        raise InputError("--workdir", str(workdir), rule) from error
    except (OSError, ValueError, RecursionError) as error:
        rule = f"its config.json is no config of this version: {first_line(error)}"
        raise InputError("--workdir", str(workdir), rule) from error


def parse_config(saved: Any) -> Config:
    """Returns a locked and checked config from plain JSON.

    A field that is missing in `saved` gets its value in `ADDED_FIELDS`, or else its default. A
    removed field is ignored if it had no effect.

    Raises:
      ValueError: naming unknown fields, or the first value that is not allowed.
    """
    if not isinstance(saved, dict):
        raise ValueError("not an object")
    config = base_config().lock()
    fields = ADDED_FIELDS | {
        field: tuple(value) if isinstance(value, list) else value
        for field, value in flatten(saved).items()
        if field not in REMOVED_FIELDS or value != REMOVED_FIELDS[field]
    }
    if unknown := fields.keys() - flatten(config.to_dict()).keys():
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    try:
        config.update_from_flattened_dict(fields)
        validate(config)
    except (ValueError, TypeError, LookupError, AttributeError, InputError) as error:
        raise ValueError(first_line(error)) from error
    return config
