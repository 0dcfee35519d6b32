"""What the command-line entries share: flags, errors in one line, exit status."""

import pathlib
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from hjepa_jax.errors import InputError


def run(main: Callable[[], None]) -> None:
    """Parses flags, calls `main`, and exits: 0 done, 2 bad input, 130 or 143 interrupted.

    Bad input of any kind becomes one line on stderr, without a traceback.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax and TFDS narrate at INFO; --verbosity=0 shows it
    try:
        app.run(lambda _: main(), flags_parser=_parse_flags)
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def fail(message: str) -> NoReturn:
    """Prints one line on stderr and exits with status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        fail(str(error))
    except (AttributeError, KeyError, ValueError, TypeError) as error:  # from config_flags
        fail(f"{type(error).__name__}: {error}")
    if len(rest) > 1:
        fail(f"{rest[1]!r}: not a flag; every option begins with --")
    return rest


def config_name(path: str) -> str:
    """configs/cifar10_tiny.py as "cifar10_tiny"."""
    return pathlib.Path(path.partition(":")[0]).stem
