"""Parses flags: help page, repeated flags, overrides of a config, config files."""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path, tuple_parser
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from hjepa_jax.data.sides import AMOUNT, SIDES
from hjepa_jax.errors import InputError
from hjepa_jax.hints import did_you_mean, flag_message, override_message
from hjepa_jax.runtime.paths import expanded

# Errors that config_flags raises, besides flags.Error, for an unknown field or a bad literal.
CONFIG_FLAGS_ERRORS = (
    AttributeError, LookupError, ValueError, TypeError, RecursionError, MemoryError,
)  # fmt: skip
MAX_LINE = 2000  # characters of an error message
CONFIGS = pathlib.Path(__file__).with_name("configs")
HELP_FLAGS = {"help", "helpshort", "helpfull", "h", "?"}
WIDTH, NAME = 80, 22  # characters of a line of the help page, and of its first column


def fail(message: str) -> NoReturn:
    """Prints one line on stderr and exits with status 2."""
    line = " ".join(message.split())
    print("error: " + line[:MAX_LINE] + "..." * (len(line) > MAX_LINE), file=sys.stderr)
    sys.exit(2)


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Sets the flags in `values` from a command line; a bad flag ends the program.

    Arguments without a flag are values of `--config`, `--input` or `--workdir`: the first of these
    that the command has.

    Args:
      argv: the command line, starting with the program's name.
      values: the defined flags.

    Raises:
      InputError: if a flag has two values, or the config file cannot be used.
    """
    for name in values:
        if isinstance(values[name].parser, ConfigFileFlagParser):
            values[name].parser = _ConfigFile(name)
    try:
        given = _named(values.read_flags_from_files(argv[1:], force_gnu=True), values)
        notes = _check_repeated(given, values)
        rest = values([argv[0], *given])
    except flags.Error as error:
        fail(flag_message(str(error), values))
    except CONFIG_FLAGS_ERRORS as error:
        fail(override_message(argv, error) or f"{type(error).__name__}: {error}")
    if len(rest) > 1:
        fail(f"{rest[1]!r}: not a flag; give it before any --")
    _reset_none(values)
    for note in notes:
        print(note, file=sys.stderr)
    return rest


def import_jax() -> None:
    """Imports JAX, which reads its settings from the environment.

    Raises:
      InputError: if JAX refuses the value of one of them.
    """
    try:
        import jax  # noqa: F401
    except ImportError:
        raise
    except Exception as error:
        named = [n for n in os.environ if n.startswith("JAX_") and n.lower() in str(error).lower()]
        name = next(iter(named), "JAX_*")
        rule = f"JAX does not start with this environment: {error}"
        raise InputError(name, os.environ.get(name), rule) from error


def asks_for_help(argv: Sequence[str]) -> bool:
    """Returns whether one of the flags asks for the help page."""
    return any(a.startswith("-") and a.lstrip("-") in HELP_FLAGS for a in argv[1:])


def help_page(main: Callable[[], None], values: flags.FlagValues = flags.FLAGS) -> str:
    """Returns the docstring of a command's module and its flags, in two columns.

    Args:
      main: the function of the command.
      values: the defined flags.
    """
    module = sys.modules[main.__module__]
    owner = sys.argv[0] if main.__module__ == "__main__" else main.__module__
    lines = [_fitted((module.__doc__ or "").strip()), "", "Flags:"]
    shown = {flag.name: flag for flag in values.get_key_flags_for_module(owner)}
    if "config" in values:  # config_flags makes it a flag of `cli`
        shown["config"] = values["config"]
    for _, flag in sorted(shown.items()):
        name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
        default = "" if flag.default in (None, False, []) else f" Default: {_plain(flag.default)}."
        text = (flag.help or "").partition(";\n")[0]  # absl adds "repeat this option ..."
        texts = {name: f"{text}{default}"}
        if isinstance(flag.parser, ConfigFileFlagParser):
            texts[f"--{flag.name}.FIELD=VALUE"] = "Sets a field; `hjepa config NAME` lists them."
        for name, text in texts.items():
            start = f"  {name:<{NAME}} "
            indent = " " * len(start) if len(name) <= NAME else " " * (NAME + 3)
            wrapped = textwrap.wrap(text, WIDTH - len(indent))
            lines += [start + wrapped[0]] if len(name) <= NAME else [start, indent + wrapped[0]]
            lines += [indent + more for more in wrapped[1:]]
    return "\n".join(lines)


def _fitted(text: str) -> str:
    """Returns a docstring with lines of at most `WIDTH`; indented lines stay as they are."""
    blocks = text.split("\n\n")
    return "\n\n".join(b if "\n  " in f"\n{b}" else textwrap.fill(b, WIDTH) for b in blocks)


def _plain(default: Any) -> str:
    return ",".join(default) if isinstance(default, list) else str(default)


def _named(given: list[str], values: flags.FlagValues) -> list[str]:
    """Returns the arguments, with a flag added to each argument that has none."""
    owner = next((name for name in ("config", "input", "workdir") if name in values), None)
    named, is_value = [], False
    for argument in given:
        if argument.startswith("-") or is_value or owner is None:
            name = argument.lstrip("-")
            switch = any(n in values and values[n].boolean for n in (name, name.removeprefix("no")))
            is_value = argument.startswith("-") and "=" not in argument and not switch
            named.append(argument)
        else:
            named.append(f"--{owner}={argument}")
    return named


def _check_repeated(given: list[str], values: flags.FlagValues) -> list[str]:
    """Refuses a flag that is given twice with different values.

    An override of a config may be repeated, because scripts append overrides. The last one counts.

    Returns:
      One note per override that a later one replaces.

    Raises:
      InputError: naming the flag and its last value.
    """
    last: dict[str, str] = {}
    notes = []
    for i, argument in enumerate(given):
        match = re.match(r"--?([^=\s]+)", argument)
        if match is None:
            continue
        name = match[1]
        if name not in values:
            name = name.removeprefix("no")
        is_override = name.startswith("config.")
        if not is_override and (name not in values or isinstance(values[name], flags.MultiFlag)):
            continue
        has_value = "=" in argument or (not is_override and values[name].boolean)
        following = given[i + 1 : i + 2]
        if not has_value and following and not following[0].startswith("-"):
            argument = f"{argument}={following[0]}"
        before, last[name] = last.get(name, argument), argument
        if before == argument:
            continue
        if is_override:
            notes.append(f"note: {before} is replaced by {argument}, which comes later")
            continue
        rule = f"is given twice ({before} comes before it); give it once"
        if isinstance(values[name].parser, flags.ListParser):
            rule += ", its values separated by commas"
        raise InputError(f"--{name}", argument.partition("=")[2], rule)
    return notes


class _ConfigFile(ConfigFileFlagParser):
    """Loads a config file. Any error in it becomes an InputError with file and line."""

    def __init__(self, name: str):
        super().__init__(name, lock_config=True)

    def parse(self, path: str) -> ConfigDict:
        """Returns the locked config of `get_config`; the text after a colon is its argument."""
        file, _, argument = config_path_of(expanded(f"--{self.name}", path)).partition(":")
        if not pathlib.Path(file).exists():
            shipped = sorted(p.stem for p in CONFIGS.glob("[a-z]*.py"))
            rule = f"no such file, and no config of the package: {', '.join(shipped)}"
            near = difflib.get_close_matches(pathlib.Path(file).stem, shipped, n=1)
            raise InputError(f"--{self.name}", path, rule + did_you_mean("", near))
        try:
            config = _load(file, argument)
        except (Exception, SystemExit) as error:
            import_jax()  # raises if JAX itself failed, not the file
            rule = f"must be a config file ({_with_place(error)})"
            raise InputError(f"--{self.name}", path, rule) from error
        if not isinstance(config, ConfigDict):
            rule = "must be a config file (get_config must return an ml_collections.ConfigDict, "
            raise InputError(f"--{self.name}", path, f"{rule}not {type(config).__name__})")
        return config.lock()


def config_path_of(value: str) -> str:
    """Returns the path of a config file, with its argument if there is one (`FILE:ARGUMENT`).

    Args:
      value: a path, or the name of a config in the package. `configs/NAME.py` and `configs/NAME`
        are such names, too, if there is no file of this path.
    """
    file, colon, argument = value.partition(":")
    path = pathlib.Path(file)
    shipped = CONFIGS / f"{path.stem}.py"
    names = (path.stem, f"configs/{path.stem}", f"configs/{path.stem}.py")
    is_name = file in names and shipped.is_file()
    return f"{shipped}{colon}{argument}" if is_name and not path.is_file() else value


def _load(file: str, argument: str) -> Any:
    """Returns the result of `get_config` in the file."""
    loader = importlib.machinery.SourceFileLoader("config_config", file)
    spec = importlib.util.spec_from_file_location("config_config", file, loader=loader)
    assert spec is not None  # because the loader is given
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise ValueError("it has no function get_config")
    return module.get_config(*([argument] if argument else []))


def _with_place(error: BaseException) -> str:
    """Returns an error in a config file, or in a module that it imports, with its file and line."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    libraries = {
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    libraries |= {f"{pathlib.Path(__file__).parent}{os.sep}", "<frozen"}
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(tuple(libraries))]
    place = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{place}{type(error).__name__}: {message}"


class _OrNone(flags.ArgumentParser):
    """Adds None, in upper or lower case, to the values of another parser."""

    def __init__(self, parser: flags.ArgumentParser, *, any_case: bool = True):
        self._parser, self._any_case = parser, any_case
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument: Any) -> Any:
        """Returns None or the value. `validate` checks which fields may be None."""
        is_none = argument == "None"
        if self._any_case and isinstance(argument, str):
            is_none = argument.lower() == "none"
        return None if is_none else self._parser.parse(argument)

    def flag_type(self) -> str:
        """Returns the name of the type, for help."""
        return self._parser.flag_type()


class _Tuple(flags.ArgumentParser):
    """Parses a tuple. If a flag is given twice, the last value counts, unlike in config_flags."""

    def parse(self, argument: Any) -> Any:
        """Returns the tuple; a default already is one."""
        return (
            argument if isinstance(argument, tuple) else tuple_parser.TupleParser().parse(argument)
        )

    def flag_type(self) -> str:
        """Returns the name of the type, for help."""
        return "tuple"


class _Amount(flags.ArgumentParser):
    """Parses an integer or a fraction; `validate` checks the range."""

    syntactic_help = "a whole number or a fraction"

    def parse(self, argument: Any) -> float:
        """Returns an int if the text is one."""
        with contextlib.suppress(ValueError):
            return int(argument) if isinstance(argument, str) else argument
        return float(argument)


class _Sides(_Tuple):
    """Parses an integer, or (height, width)."""

    def parse(self, argument: Any) -> Any:
        """Returns an int for an integer, or for a tuple of two equal integers."""
        with contextlib.suppress(ValueError, TypeError):
            return int(argument)
        found = super().parse(argument)
        is_square = isinstance(found, tuple) and len(found) == 2 and found[0] == found[1]
        return found[0] if is_square else found


# "none" is also a value of loss.regularizer and other string fields: see `_reset_none`.
for _kind, _parser in (
    (int, _OrNone(flags.IntegerParser())),
    (float, _OrNone(flags.FloatParser())),
    (tuple, _OrNone(_Tuple())),
    (AMOUNT, _OrNone(_Amount())),
    (SIDES, _OrNone(_Sides())),
    (str, _OrNone(flags.ArgumentParser(), any_case=False)),
):
    config_flags.register_flag_parser_for_type(_kind, _parser)


def _reset_none(values: flags.FlagValues) -> None:
    """Replaces "none" by None in the string fields that may be None."""
    for name in values:
        if not isinstance(values[name].parser, _ConfigFile) or values[name].value is None:
            continue
        for field, value in config_flags.get_override_values(values[name]).items():
            if isinstance(value, str) and value.lower() == "none" and _optional(field):
                config_path.set_value(field, values[name].value, None)


def _optional(field: str) -> bool:
    from hjepa_jax.config import base_config
    from hjepa_jax.config.fields import get_field

    return get_field(base_config(), field) is None
