"""Reads the meaning of every config field from the comments in `defaults`.

The build of the site loads this file by its path, so it imports only the standard library.
"""

import pathlib
import re


def config_fields() -> list[tuple[str, str, str]]:
    """Returns name, default and comment of every field, in the order of `base_config`."""
    source = pathlib.Path(__file__).with_name("defaults.py").read_text(encoding="utf-8")
    text = source.split("def _run")[1].split("def base_config")[0]
    found, above = [], []
    for line in text.splitlines():
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
            continue
        field = re.match(r"    c\.([\w.]+) = (.*?)(?:  # (.*))?$", line)
        if field and field[2] != "ConfigDict()":
            name, default, beside = field.groups()
            default = "None" if default.startswith("placeholder") else default
            default = re.sub(r"^(?:amount|sides)\((.*)\)$", r"\1", default)
            comment = ". ".join(filter(None, [beside, *above[:1], " ".join(above[1:])]))
            found.append((name, default, comment))
        above = []
    return found
