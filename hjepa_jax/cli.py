"""What the command-line entries share: flags, errors in one line, exit status."""

import contextlib
import difflib
import os
import pathlib
import re
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
# Characters of a message, which may quote thousands of what it was given, and of a flag's value.
MAX_LINE, MAX_VALUE = 2000, 200


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


def define_platform() -> flags.FlagHolder[str | None]:
    """The flag `--platform`, of commands that look at a run, maybe on another machine."""
    return flags.DEFINE_string("platform", None, "Backend to use, auto for any (that of the run).")


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
        fail(_told(str(error)))
    except CONFIG_FLAGS_ERRORS as error:
        fail(_of_override(argv, error) or _of_file(argv, error))
    if len(rest) > 1:
        fail(f"{rest[1]!r}: not a flag; every option begins with --")
    return rest


def _told(message: str) -> str:
    """What absl says of a flag, with the rule for its value."""
    if missing := re.match(r"flag --(\w+)=None: Flag --\w+ must have a value", message):
        return f"--{missing[1]}: must be given"
    if not_so := re.match(r"flag --config\.([^=]+)=(.*?): ", message, re.DOTALL):
        from hjepa_jax.fields import RULES

        field, value = not_so[1], not_so[2]
        value = value[:MAX_VALUE] + "..." * (len(value) > MAX_VALUE)  # and leave room for the rule
        kind = float if "[" in field else _config_types().get(field)
        rule = RULES[kind] if kind else "is a group of fields, each of which is set by itself"
        return str(InputError(field, value, rule))
    return message


def _of_override(argv: list[str], error: BaseException) -> str:
    """Of the first override that names no field of a config, or no element of one; else empty."""
    known = _config_types()
    matches = (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv)
    overrides = [match[1] for match in matches if match]
    for field in overrides:
        if (name := field.partition("[")[0]) not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean --config.{near[0]}?" if near else ""
            return f"--config.{field}: is not a field of a config{hint}"
    if isinstance(error, (ImportError, NameError, SyntaxError)):  # of the config file
        return ""
    return next((f"--config.{field}: {error}" for field in overrides if "[" in field), "")


def _config_types() -> dict[str, type]:
    """The type of each field of a config; JAX is loaded for it."""
    from hjepa_jax.config import base_config
    from hjepa_jax.fields import field_types

    return field_types(base_config())


def _of_file(argv: list[str], error: BaseException) -> str:
    """Of a config file that is none."""
    paths = [a.partition("=")[2] for a in argv if a.lstrip("-").startswith("config=")]
    reason = f"{type(error).__name__}: {error}"
    if not paths:
        return reason
    return str(InputError("--config", paths[-1], f"must be a config file ({reason})"))


def config_name(path: str) -> str:
    """configs/cifar10_tiny.py as "cifar10_tiny"."""
    return pathlib.Path(path.partition(":")[0]).stem
