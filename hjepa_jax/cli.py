"""What the command-line entries share: output, errors in one line, exit status, common flags."""

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

from hjepa_jax.command_line import asks_for_help, fail, help_page, import_jax, parse_flags
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.host_memory import keep_freed_memory
from hjepa_jax.runtime.paths import local_path

__all__ = ["config_name", "define_platform", "define_workdirs", "fail", "parse_flags", "run"]

flags.disclaim_key_flags()  # flags that are defined here belong to the command that asks for them


def run(main: Callable[[], None]) -> None:
    """Parses flags, calls `main`, and exits: 0 done, 2 bad input, 130, 141 or 143 interrupted.

    Bad input of any kind becomes one line on stderr, without a traceback.
    """
    _prepare_output()
    keep_freed_memory()  # before anything imports NumPy, whose threads settle how memory is had
    # Orbax and TFDS narrate, and log with a traceback what they raise; --verbosity=0 shows it.
    logging.set_verbosity(logging.FATAL)
    try:
        try:
            if asks_for_help(sys.argv):
                print(help_page(main))
            else:
                app.run(lambda _: _start(main), flags_parser=parse_flags)
        finally:
            sys.stdout.flush()  # here, where an error can still be told
    except InputError as error:
        fail(str(error))
    except BrokenPipeError:  # of `... | head`; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as a shell says it; Windows has no signal of that name
    except OSError as error:  # a full disk, too many open files: nothing in the program is wrong
        fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, InputError):
            sys.stdout.flush()
        os._exit(128 + signal.SIGINT)  # sys.exit would wait for a thread that saves


def _start(main: Callable[[], None]) -> None:
    import_jax()
    main()


def define_platform() -> flags.FlagHolder[str | None]:
    """The flag `--platform`, of commands that look at a run, maybe on another machine."""
    return flags.DEFINE_string("platform", None, "Backend to use, auto for any (that of the run).")


def define_workdirs() -> flags.FlagHolder[list[str]]:
    """The flag `--workdir`, of commands that take one run or several; see `workdirs`."""
    text = "The run's directory. Several runs: give it several times."
    return flags.DEFINE_multi_string("workdir", None, text, required=True)


def workdirs(values: list[str]) -> list[pathlib.Path]:
    """The directories that `--workdir` names, each once.

    A value with commas that is no directory is a list of them.

    Raises:
      InputError: for a value that is no path, or a directory that is given twice.
    """
    found: dict[pathlib.Path, str] = {}
    for value in values:
        whole = "," not in value or local_path("--workdir", value).exists()
        for one in [value] if whole else value.split(","):
            path = local_path("--workdir", one)
            if path.resolve() in {other.resolve() for other in found}:
                raise InputError("--workdir", one, "is given twice; give each run once")
            found[path] = one
    return list(found)


def config_name(path: str) -> str:
    """configs/cifar10_tiny.py as "cifar10_tiny"."""
    return pathlib.Path(path.partition(":")[0]).stem


def _prepare_output() -> None:
    """Makes stdout and stderr take any text, and say in one line why they cannot be written.

    A descriptor that the caller has closed (`>&-`) is opened on the null device: else the next file
    that is opened would get its number, and the text that is meant for it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, io.TextIOWrapper) and _descriptor(stream) == descriptor:
            setattr(sys, name, _wrapped(stream, descriptor))


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _wrapped(stream: io.TextIOWrapper, descriptor: int) -> io.TextIOWrapper:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, required=descriptor == 1)),
        encoding=stream.encoding,
        errors="backslashreplace",  # a class name need not be of the terminal's character set
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Output(io.FileIO):
    """Writes to stdout or stderr. From the first failure on, what is written is dropped.

    Args:
      descriptor: the number of the open file.
      required: whether a failure is an error (stdout); else it is no reason to stop (stderr).
    """

    def __init__(self, descriptor: int, *, required: bool):
        super().__init__(descriptor, "wb", closefd=False)
        self._required = required

    def write(self, data: Any) -> int | None:
        """See `io.RawIOBase.write`.

        Raises:
          BrokenPipeError: when nobody reads a required output any more.
          InputError: when a required output cannot be written. A terminal that has gone away is
            no reason to stop: the system sends SIGHUP then, on which a run saves first.
        """
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
