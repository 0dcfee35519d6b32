"""The files of an image folder: which are used, and why the others are not.

A folder holds one sub-folder per class, or one folder per split with the class folders inside:

| split      | folder name, in any case (see `hjepa_jax.data.test_split.NAMES`)    |
|------------|---------------------------------------------------------------------|
| training   | `train`, `training`                                                 |
| test       | `test`, `testing`; if there is none: `val`, `valid`, `validation`, `dev` |

Folders inside a class folder belong to the class. If no image lies in a sub-folder, or all are in
folders of splits, the images have no labels. `labelled=False` reads any tree without labels: every
image below the folder (or below its split folders) is used.

A file with an image suffix is used; a file with another suffix is used if its content is an image.
Every other file is listed with a reason.
"""

import os
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from hjepa_jax.data.folder_tree import (
    Folder,
    has_images,
    holds_images,
    is_run,
    is_split,
    is_within,
    of_role,
    sub_folders,
)
from hjepa_jax.data.image_file import has_image_suffix, why_no_image
from hjepa_jax.data.test_split import split_role
from hjepa_jax.data.usage import Unused
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.names import escaped

HIDDEN, EMPTY, OUTSIDE = "hidden", "empty folder", "link out of the folder"
RUN = "work directory of a run"
HARMLESS = (HIDDEN, EMPTY, RUN)  # a folder with nothing else is ignored: it is not a broken class
_RUN_FOLDERS = ("checkpoints", "features", "figures", "finetune", "projector")


class Listing(NamedTuple):
    """The files of a split, ordered by class and name, and their labels (None = none)."""

    class_names: tuple[str, ...]
    files: list[str]
    labels: Int32[np.ndarray, " n"] | None

    def part(self, rows: Int[np.ndarray, " rows"]) -> "Listing":
        """Returns some of the files."""
        labels = None if self.labels is None else self.labels[rows]
        return Listing(self.class_names, [self.files[i] for i in rows], labels)

    def names(self, top: str) -> tuple[str, ...]:
        """Returns printable names of the files, relative to the folder `top`."""
        return tuple(escaped(os.path.relpath(path, top)) for path in self.files)


class FolderListing(NamedTuple):
    """Everything in a folder.

    Attributes:
      top: absolute path of the folder, without links.
      splits: training files and, if the folder has a test split, test files.
      split_names: names of their folders; empty if the folder has no splits.
      unused: every other file, or a folder around it.
    """

    top: str
    splits: list[Listing]
    split_names: list[str]
    unused: list[Unused]


def list_folder(
    source: str,
    root: str | os.PathLike[str],
    *,
    labelled: bool = True,
    follow_links: bool = False,
) -> FolderListing:
    """Lists the images of a folder by split and class, and everything that is not used.

    Args:
      source: name of the source, for errors.
      root: the folder.
      labelled: whether sub-folders are classes. If not, the images have no labels.
      follow_links: whether links to files and folders outside of the folder are followed.

    Raises:
      InputError: there is no image, a class has no image, or train and test do not have the same
        classes.
    """
    lister = _Lister(source, os.path.realpath(root), labelled, follow_links)
    splits, names = lister.list_splits()
    return FolderListing(lister.top, splits, names, lister.unused)


def list_images(
    source: str, root: str | os.PathLike[str], *, follow_links: bool = False
) -> FolderListing:
    """Lists all images below a folder in the order of their paths, without splits and classes."""
    lister = _Lister(source, os.path.realpath(root), labelled=False, follow_links=follow_links)
    return FolderListing(lister.top, [lister.list_all()], [], lister.unused)


class _Lister:
    """Lists one folder, and collects everything that is not used in `unused`."""

    def __init__(self, source: str, top: str, labelled: bool, follow_links: bool):
        self.source, self.top, self.labelled = source, top, labelled
        self.follow_links = follow_links
        self.unused = list[Unused]()

    def list_splits(self) -> tuple[list[Listing], list[str]]:
        """Returns the splits and their folder names; without splits: one listing and no name."""
        top = Folder(self.top, (self.top,))
        folders, files = self._scan(top, refuse_links=self.labelled)
        trains, tests = of_role(folders, "train"), of_role(folders, "test")
        tests += of_role(folders, "val")
        nested = [each for each in trains if sub_folders(each)]
        flat = [each for each in trains if has_images(each)]
        if nested and is_split(nested[0], folders, tests):
            used = [nested[0], *self._choose_test(tests)]
        elif flat and self._is_flat_split(folders, tests):
            self.labelled = False
            used = [flat[0], *[each for each in tests if holds_images(each)][:1]]
        else:
            return [self._list_split(top, folders, files)], []
        for folder in folders:
            if folder not in used:
                self._drop_folder(folder, used)
        self._drop_files(files, f"beside {escaped(used[0].name)}/")
        splits = [
            self._list_split(folder, *self._scan(folder, refuse_links=self.labelled))
            for folder in used
        ]
        names = [escaped(folder.name) for folder in used]
        differing = {*splits[0].class_names} ^ {*splits[-1].class_names}
        if differing:
            rule = f"{names[0]} and {names[-1]} must have the same classes; one lacks"
            self._refuse(f"{rule} {', '.join(sorted(differing))}")
        return splits, names

    def list_all(self) -> Listing:
        """Returns all images, as one split."""
        top = Folder(self.top, (self.top,))
        return self._list_split(top, *self._scan(top))

    def _choose_test(self, tests: list[Folder]) -> list[Folder]:
        """Returns the first folder with class folders; empty if all folders are empty."""
        for folder in tests:
            if sub_folders(folder) if self.labelled else holds_images(folder):
                return [folder]
        for folder in tests:
            if self.labelled and any(name[0] != "." for name in os.listdir(folder.path)):
                self._refuse_without_classes(folder)
        return []

    def _is_flat_split(self, folders: list[Folder], tests: list[Folder]) -> bool:
        """Returns whether folders without class folders are splits; `train` may also be a class."""
        if self.labelled:
            return all(split_role(folder.name) for folder in folders)
        return len(folders) == 1 or any(map(holds_images, tests))

    def _list_split(self, root: Folder, folders: list[Folder], files: list[str]) -> Listing:
        """Lists the images of a split, by class if it has class folders."""
        if self.labelled and (not has_images(root) or any(map(holds_images, folders))):
            return self._list_classes(root, folders, files)
        images = self._list_images(folders, files)
        if not images:
            self._refuse(f"there is no image in {escaped(root.path)}")
        return Listing((), images, None)

    def _list_classes(self, root: Folder, folders: list[Folder], files: list[str]) -> Listing:
        """Lists the class folders of a split."""
        self._drop_files(files, "beside the class folders")
        if all(split_role(folder.name) for folder in folders):
            self._refuse_without_classes(root)
        names, paths, labels = [], [], []
        for folder in folders:
            self._check_is_class(folder)
            first = len(self.unused)
            images = self._list_images(*self._scan(folder))
            lost = [each for each in self.unused[first:] if each.reason not in HARMLESS]
            if images:
                labels += [len(names)] * len(images)
                names.append(escaped(folder.name))
                paths += images
            elif lost:
                reason = f"{escaped(lost[0].name)}: {lost[0].reason}"
                self._refuse(f"there is no image in {escaped(folder.path)} ({reason})")
            else:
                self._drop(folder.path, EMPTY, is_folder=True)
        if not names:
            self._refuse_without_classes(root)
        return Listing(tuple(names), paths, np.array(labels, np.int32))

    def _check_is_class(self, folder: Folder) -> None:
        """Refuses a split, or a folder of splits, beside class folders: it would become a class."""
        inside = sub_folders(folder)
        if not inside or has_images(folder):
            return
        path = escaped(folder.path)
        if split_role(folder.name):
            self._refuse(
                f"{path} is a split: the other classes must be in a folder train beside it"
            )
        for name in inside:
            if (split_role(name) or ("",))[0] == "train":
                rule = f"must hold one sub-folder per class, but {path} holds a split"
                self._refuse(f"{rule}, {escaped(name)}; name folder:{path}")

    def _list_images(self, folders: list[Folder], files: list[str]) -> list[str]:
        """Returns the images among the files and in the folders, ordered by path."""
        found: dict[str, list[str]] = {}
        for path in files:
            reason = "" if has_image_suffix(path) else why_no_image(path)
            if reason:
                self._drop(path, reason)
            else:
                found[path] = [path]
        for inner in folders:
            first = len(self.unused)
            found[inner.path] = self._list_images(*self._scan(inner))
            if not found[inner.path] and len(self.unused) == first:
                self._drop(inner.path, EMPTY, is_folder=True)
        return [image for path in sorted(found) for image in found[path]]

    def _scan(
        self, folder: Folder, *, refuse_links: bool = False
    ) -> tuple[list[Folder], list[str]]:
        """Returns the sub-folders and files that may be used, by name, and drops the others.

        Args:
          folder: the folder.
          refuse_links: whether a link to a folder outside of the data is an error. It would be a
            lost class or split.
        """
        with os.scandir(folder.path) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        folders, files = [], []
        for entry in ordered:
            is_folder = entry.is_dir()
            reason = self._why_unused(entry, folder)
            if reason == OUTSIDE and is_folder and refuse_links:
                rule = f"there is no image in {escaped(entry.path)} (it is a {OUTSIDE}"
                self._refuse(f"{rule}; data.follow_links=True follows it)")
            if reason:
                self._drop(entry.path, reason, is_folder=is_folder)
            elif is_folder:
                real = os.path.join(folder.chain[-1], entry.name)
                real = os.path.realpath(real) if entry.is_symlink() else real
                folders.append(Folder(entry.path, (*folder.chain, real)))
            else:
                files.append(entry.path)
        return folders, files

    def _why_unused(self, entry: os.DirEntry[str], folder: Folder) -> str:
        """Returns the reason why an entry is not used; "" if it may be used. Opens no file."""
        if entry.name.startswith("."):
            return HIDDEN
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            if not self.follow_links and not is_within(self.top, real):
                return OUTSIDE
            if any(is_within(real, around) for around in folder.chain):
                return "link to a folder around it"
            if not os.path.exists(real):
                return "link to nothing"
        if not entry.is_dir():
            return "" if entry.is_file() else "no file"  # a pipe, which would block when opened
        own = entry.name in _RUN_FOLDERS and is_run(folder.path)
        return RUN if own or is_run(entry.path) else ""

    def _drop_folder(self, folder: Folder, used: list[Folder]) -> None:
        """Drops a folder next to the used splits; the reason states its number of files."""
        count = sum(len(names) for _, _, names in os.walk(folder.path))
        names = " and ".join(f"{escaped(each.name)}/" for each in used)
        files = f"{count} file{'s' if count != 1 else ''}"
        reason = f"folder of {files} beside {names}" if count else EMPTY
        self._drop(folder.path, reason, is_folder=True)

    def _drop_files(self, files: list[str], reason: str) -> None:
        for path in files:
            self._drop(path, reason)

    def _drop(self, path: str, reason: str, *, is_folder: bool = False) -> None:
        name = os.path.relpath(path, self.top) + ("/" if is_folder else "")
        self.unused.append(Unused(name, reason))

    def _refuse_without_classes(self, folder: Folder) -> None:
        path = escaped(folder.path)
        self._refuse(
            f"{path} must hold one sub-folder per class; images:{path} reads it without labels"
        )

    def _refuse(self, rule: str) -> None:
        raise InputError("data.source", self.source, rule)
