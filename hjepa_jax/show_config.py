"""Prints every field of a config with its value and its meaning.

  hjepa config cifar10_tiny [--config.optim.learning_rate=1e-3 ...]

The argument is a config file, or the name of a config in the package. A star marks the values that
differ from the defaults. Set a field with --config.GROUP.FIELD=VALUE.
"""

import textwrap
from typing import Any

from hjepa_jax import cli

_CONFIG = cli.define_config()
NAME, VALUE, WIDTH = 24, 14, 80  # characters of two columns and of a line


def main() -> None:
    """Runs the command."""
    print(page(_CONFIG.value))


def page(config: Any) -> str:
    """Returns a table of the fields for each group."""
    from hjepa_jax.config import base_config
    from hjepa_jax.config.fields import get_field
    from hjepa_jax.config.meanings import config_fields

    defaults, lines, group = base_config(), list[str](), None
    for field, _, meaning in config_fields():
        before, _, name = field.rpartition(".")
        if before != group:
            group = before
            lines += ["", f"--config.{group}." if group else "--config."]
        value = get_field(config, field)
        star = "*" if value != get_field(defaults, field) else " "
        start = f"{star} {name:<{NAME}}{_plain(value):<{VALUE}}"
        indent = " " * (NAME + VALUE + 2)
        wrapped = textwrap.wrap(meaning, WIDTH - len(indent))
        if len(start) > len(indent):  # a long value has a line of its own
            lines += [start.rstrip(), *(indent + text for text in wrapped)]
        else:
            lines += [start + wrapped[0], *(indent + text for text in wrapped[1:])]
    return "\n".join(lines[1:])


def _plain(value: Any) -> str:
    return f"{value} " if not isinstance(value, tuple) else f"{value} ".replace(", ", ",")


if __name__ == "__main__":
    cli.run(main)
