"""Makes names of classes, files and runs printable. Such names may contain any character."""

import os
import re
import unicodedata

# Halves of surrogate pairs. Python uses them for the bytes of a name that is not UTF-8.
_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def encodable(text: str) -> str:
    """Returns the text with a replacement character for each one that UTF-8 cannot encode."""
    return _SURROGATES.sub("\ufffd", text)


def printable(text: str) -> str:
    """Returns the `encodable` text on one line, with spaces for tabs, line breaks and the like."""
    return _CONTROLS.sub(" ", encodable(text))


def escaped(name: str) -> str:
    r"""Returns the name as text for any terminal and any UTF-8 file.

    A file name is bytes. Bytes that are not UTF-8, and control characters, are written as `\xe9`
    and so on. Different names stay different.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" else c for c in text)
