"""The lock of a work directory, and the clean-up after a start that fails."""

import contextlib
import datetime
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator
from typing import IO

from hjepa_jax.errors import InputError
from hjepa_jax.runs.record import NAME as RECORD
from hjepa_jax.runs.workdir import checkpoint_sizes, writing
from hjepa_jax.runtime.files import fcntl

# Files and folders that a start makes in the work directory before its first step.
_MADE_BY_A_START = ("checkpoints", "config.json", RECORD, "metrics.jsonl", "lock")


@contextlib.contextmanager
def claimed(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Holds the work directory (see `locked`) and removes everything if the start fails.

    Yields:
      A function to call when the start has succeeded. If the block ends with an error before that
      call, everything that it made is removed: the directory itself, config.json, an empty folder
      `checkpoints`.

    Raises:
      InputError: see `locked`.
    """
    with writing(workdir):
        missing = [f for f in (workdir, *workdir.absolute().parents) if not f.exists()]
        existing = {"lock"} if (workdir / "lock").exists() else set()
    with locked(workdir):
        existing |= {path.name for path in workdir.iterdir()} - {"lock"}
        started = []
        try:
            yield lambda: started.append(True)
        except BaseException:
            if not started:
                _remove_start(workdir, existing, missing)
            raise


def _remove_start(workdir: pathlib.Path, existing: set[str], missing: list[pathlib.Path]) -> None:
    """Removes the files and folders that a failed start made.

    Args:
      workdir: the run's directory.
      existing: names of the files and folders in it that existed before the start.
      missing: the directory and its parents, if they did not exist before the start.
    """
    for name in _MADE_BY_A_START:
        path = workdir / name
        if name in existing:
            continue
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif not checkpoint_sizes(workdir):
            shutil.rmtree(path, ignore_errors=True)
    for folder in missing:
        with contextlib.suppress(OSError):  # not empty: it holds other files
            folder.rmdir()


def is_claimed(workdir: pathlib.Path) -> bool:
    """Returns whether this process can see the claim of another process on the directory."""
    with writing(workdir):
        return workdir.is_dir() if fcntl is None else (workdir / "lock").exists()


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the work directory for this process, so that no other run writes into it.

    The operating system locks the file `lock`, which names the owner. The lock ends with the
    process, even if the process is killed. Systems without such locks (Windows, some network file
    systems) do not lock. The directory is made if it is missing.

    Raises:
      InputError: if another process holds it, or it cannot be written ("--workdir").
    """
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with _lock_file(workdir) as file:
        started = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {started}"
        with contextlib.suppress(OSError):  # a full disk: the lock works without its text
            file.truncate(0)
            os.write(file.fileno(), owner.encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _lock_file(workdir: pathlib.Path) -> IO[bytes]:
    """Returns the file `lock`, open and locked.

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
        file.close()  # another start failed at this moment and removed the file


def lock_owner(workdir: pathlib.Path) -> str:
    """Returns which other process holds the work directory; "" if none does."""
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
