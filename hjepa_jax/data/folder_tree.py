"""A folder that is visited in a data set, and questions about its content."""

import os
from typing import NamedTuple

from hjepa_jax.data.image_file import has_image_suffix
from hjepa_jax.data.test_split import split_role


class Folder(NamedTuple):
    path: str
    chain: tuple[str, ...]  # real paths of this folder and of the folders on the way to it

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def of_role(folders: list[Folder], role: str) -> list[Folder]:
    """Returns the folders with this role, best name first: `train`, `Train`, `train_images`."""
    ranked = []
    for folder in folders:
        found = split_role(folder.name)
        if found and found[0] == role:
            ranked.append((found[1], len(folder.name), folder.name.swapcase(), folder))
    return [folder for *_, folder in sorted(ranked)]


def is_split(train: Folder, folders: list[Folder], tests: list[Folder]) -> bool:
    """Returns whether `train` is a split. It may also be a class, beside "car" and "plane"."""
    return len(folders) == 1 or any(map(sub_folders, tests)) or not has_images(train)


def is_within(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def is_run(folder: str) -> bool:
    """Returns whether a folder is the work directory of a run, or holds the report of several."""

    def has(*names: str) -> bool:
        return any(os.path.exists(os.path.join(folder, name)) for name in names)

    if has("config.json") and has("checkpoints", "metrics.jsonl", "run.json"):
        return True
    return has("report.html", "report.md") and has("figures")


def sub_folders(folder: Folder) -> list[str]:
    with os.scandir(folder.path) as entries:
        return [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]


def holds_images(folder: Folder) -> bool:
    """Returns whether the folder or one of its sub-folders holds images."""
    return any(has_image_suffix(name) for _, _, names in os.walk(folder.path) for name in names)


def has_images(folder: Folder) -> bool:
    """Returns whether the folder itself holds images."""
    with os.scandir(folder.path) as entries:
        return any(has_image_suffix(entry.name) and entry.is_file() for entry in entries)
