"""Shared by all commands: output, errors in one line, exit status, common flags."""

import contextlib
import errno
import io
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from absl import app, flags, logging
from ml_collections import config_flags

from hjepa_jax.command_line import asks_for_help, fail, help_page, import_jax, parse_flags
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.host_memory import keep_freed_memory
from hjepa_jax.runtime.paths import local_path

__all__ = [
    "config_name", "define_config", "define_platform", "define_workdirs", "fail", "parse_flags",
    "run",
]  # fmt: skip

flags.disclaim_key_flags()  # the flags defined here belong to the calling command


def run(main: Callable[[], None]) -> None:
    """Parses flags, calls `main`, and exits: 0 done, 2 bad input, 130, 141 or 143 interrupted.

    Bad input of any kind becomes one line on stderr, without a traceback.
    """
    _prepare_output()
    keep_freed_memory()  # before NumPy is imported
    # Hides the messages and tracebacks that Orbax and TFDS log; --verbosity=0 shows them.
    logging.set_verbosity(logging.FATAL)
    try:
        try:
            if asks_for_help(sys.argv):
                print(help_page(main))
            else:
                app.run(lambda _: _start(main), flags_parser=parse_flags)
        finally:
            sys.stdout.flush()  # here, because errors are still reported
    except InputError as error:
        fail(str(error))
    except BrokenPipeError:  # `... | head`; Python would report it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE; signal.SIGPIPE is missing on Windows
    except OSError as error:  # a full disk, too many open files: not a bug
        fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, InputError):
            sys.stdout.flush()
        os._exit(128 + signal.SIGINT)  # sys.exit would wait for a save


def _start(main: Callable[[], None]) -> None:
    import_jax()
    main()


def define_platform() -> flags.FlagHolder[str | None]:
    """Defines `--platform` for commands that read a run, which may come from another machine."""
    return flags.DEFINE_string("platform", None, "Backend to use, or auto (default: the run's).")


def define_config() -> flags.FlagHolder[Any]:
    """Defines `--config` and its overrides; the flag may be left out before the name."""
    try:
        holder = config_flags.DEFINE_config_file(
            "config", None, "Config file, or the name of a config in the package.", lock_config=True
        )
    except flags.Error as unreadable:  # a --flagfile, which is read at once
        fail(str(unreadable))
    flags.mark_flag_as_required("config")
    return holder


def define_workdirs() -> flags.FlagHolder[list[str]]:
    """Defines `--workdir` for commands that take one or several runs; see `workdirs`."""
    text = "Directories of runs; the flag may be left out before them."
    return flags.DEFINE_multi_string("workdir", None, text, required=True)


def workdirs(values: list[str]) -> list[pathlib.Path]:
    """Returns the directories that `--workdir` names; see `separated`.

    Raises:
      InputError: if a value is not a path, or a directory is given twice.
    """
    found: dict[pathlib.Path, str] = {}
    for one in separated("--workdir", values):
        path = local_path("--workdir", one)
        if path.resolve() in {other.resolve() for other in found}:
            raise InputError("--workdir", one, "is given twice; give each run once")
        found[path] = one
    return list(found)


def separated(flag: str, values: list[str]) -> list[str]:
    """Splits values at commas, unless a file or folder with the whole name exists.

    Raises:
      InputError: if a value is not a path.
    """
    wholes = ["," not in value or local_path(flag, value).exists() for value in values]
    parts = [[v] if whole else v.split(",") for v, whole in zip(values, wholes, strict=True)]
    return [one for part in parts for one in part]


def config_name(path: str) -> str:
    """Returns "cifar10_tiny" for configs/cifar10_tiny.py."""
    return pathlib.Path(path.partition(":")[0]).stem


def _prepare_output() -> None:
    """Makes stdout and stderr accept any text and report write errors in one line.

    A descriptor that the caller has closed (`>&-`) is opened on the null device. Otherwise the next
    opened file would get its number, and receive the output.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(descriptor, "w", encoding="utf-8", closefd=False)
        if isinstance(stream, io.TextIOWrapper) and _is_open_on(stream, descriptor):
            stream.flush()
            output = io.TextIOWrapper(
                io.BufferedWriter(_Output(descriptor, required=descriptor == 1)),
                encoding=stream.encoding,
                errors="backslashreplace",  # class names may contain any character
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, output)


def _is_open_on(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


class _Output(io.FileIO):
    """Writes to stdout or stderr. After the first failure all output is dropped.

    On a terminal, output begins below a live line (text after a carriage return), and never in the
    middle of a line that was cleared.

    Args:
      descriptor: the number of the open file.
      required: whether a failure is an error (stdout), or is ignored (stderr).
    """

    before = b""  # written before the next output on the terminal; shared by stdout and stderr

    def __init__(self, descriptor: int, *, required: bool):
        super().__init__(descriptor, "wb", closefd=False)
        self._required, self._terminal = required, self.isatty()

    def write(self, data: Any) -> int | None:
        """See `io.RawIOBase.write`.

        Raises:
          BrokenPipeError: if the reader of a required output is gone.
          InputError: if a required output cannot be written. A closed terminal is ignored: the
            system sends SIGHUP, and the run saves before it stops.
        """
        text = bytes(data)
        if self._terminal:
            if not text.startswith((b"\r", b"\n")) and _Output.before:
                super().write(_Output.before)
            if text.endswith(b"\n"):
                _Output.before = b""
            elif b"\r" in text and text != b"\r":
                shown = text.rpartition(b"\r")[2].replace(b"\033[K", b"").strip()
                _Output.before = b"\n" if shown else b"\r"
        try:
            return super().write(data)
        except OSError as error:
            if self._required and isinstance(error, BrokenPipeError):
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if self._required and error.errno != errno.EIO:
                raise InputError("stdout", 1, f"cannot be written ({error.strerror})") from error
            return len(data)
