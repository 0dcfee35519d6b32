"""Finds the file that `data.class_list` names."""

from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent


def find_class_list(path: str) -> Path:
    """Returns the file; a relative path is looked up in the current folder, then in the package.

    Shipped configs name their lists relative to the package, and must work in any folder.
    """
    file = Path(path)
    return file if file.exists() or file.is_absolute() else PACKAGE / file


def resolve_class_list(config: Any, config_file: str) -> None:
    """Makes the path of a list absolute if the list is in the folder of the config file.

    A list in the current folder has precedence. `find_class_list` tries the package last, because a
    user's own list may have the name of a shipped one.
    """
    path = config.get("data", {}).get("class_list")
    if isinstance(path, str) and not Path(path).expanduser().exists():
        beside = Path(config_file).absolute().parent / Path(path).expanduser()
        if beside.exists():
            config.data.class_list = str(beside)
