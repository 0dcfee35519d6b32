"""Names of classes, files and runs, which may hold any character, as text that can be shown."""

import os
import re
import unicodedata

# Halves of surrogate pairs: Python has them in place of the bytes of a name that is not UTF-8.
_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def encodable(text: str) -> str:
    """The text with a replacement character for each one that UTF-8 does not have."""
    return _SURROGATES.sub("\ufffd", text)


def printable(text: str) -> str:
    """The text on one line: `encodable`, and a space for tabs, line breaks and the like."""
    return _CONTROLS.sub(" ", encodable(text))


def escaped(name: str) -> str:
    r"""Returns the name as text that every terminal and every UTF-8 file takes.

    A file name is bytes. Bytes that are not UTF-8 are written as `\xe9`, and so are control
    characters. So two names that differ still differ.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" else c for c in text)
