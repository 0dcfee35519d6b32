"""What the command-line entries share: flags, errors in one line, exit status."""

import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from hjepa_jax.errors import InputError
from hjepa_jax.host_memory import keep_freed_memory

# What config_flags raises, beside flags.Error, at an override that names no field or is no literal.
# The last three: a config file is a program of the user's.
CONFIG_FLAGS_ERRORS = (
    AttributeError, LookupError, ValueError, TypeError, RecursionError, MemoryError,
    ImportError, NameError, SyntaxError,
)  # fmt: skip
MAX_LINE = 2000  # characters of a message: it may quote thousands of what it was given


def run(main: Callable[[], None]) -> None:
    """Parses flags, calls `main`, and exits: 0 done, 2 bad input, 130, 141 or 143 interrupted.

    Bad input of any kind becomes one line on stderr, without a traceback.
    """
    keep_freed_memory()  # before anything imports NumPy, whose threads settle how memory is had
    # Orbax and TFDS narrate, and log with a traceback what they raise; --verbosity=0 shows it.
    logging.set_verbosity(logging.FATAL)
    try:
        app.run(lambda _: main(), flags_parser=parse_flags)
    except InputError as error:
        fail(str(error))
    except BrokenPipeError:  # of `... | head`; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as a shell says it; Windows has no signal of that name
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(128 + signal.SIGINT)  # sys.exit would wait for a thread that saves


def fail(message: str) -> NoReturn:
    """Prints one line on stderr and exits with status 2."""
    line = " ".join(message.split())
    print("error: " + line[:MAX_LINE] + "..." * (len(line) > MAX_LINE), file=sys.stderr)
    sys.exit(2)


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Sets the flags in `values` from a command line; one that cannot be set ends the program.

    Args:
      argv: the command line, the program's name first.
      values: the flags that are defined.
    """
    try:
        rest = values(argv)
    except flags.Error as error:
        fail(str(error))
    except CONFIG_FLAGS_ERRORS as error:
        fail(f"{type(error).__name__}: {error}")
    if len(rest) > 1:
        fail(f"{rest[1]!r}: not a flag; every option begins with --")
    return rest


def config_name(path: str) -> str:
    """configs/cifar10_tiny.py as "cifar10_tiny"."""
    return pathlib.Path(path.partition(":")[0]).stem
