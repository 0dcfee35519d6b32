"""Where the file that `data.class_list` names is looked for."""

from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent


def find_class_list(path: str) -> Path:
    """Returns the file. A relative path counts from the current folder, or from the package.

    The shipped configs name their lists from the package. They must work in any folder, and so
    must `probe` and `report` of such a run.
    """
    file = Path(path).expanduser()
    return file if file.exists() or file.is_absolute() else PACKAGE / file


def resolve_class_list(config: Any, config_file: str) -> None:
    """Makes a list beside the config's file absolute, unless the current folder has such a file.

    The package comes last: a list of the user's own may be called like a shipped one.
    """
    path = config.get("data", {}).get("class_list")
    if isinstance(path, str) and not Path(path).expanduser().exists():
        beside = Path(config_file).absolute().parent / Path(path).expanduser()
        if beside.exists():
            config.data.class_list = str(beside)
