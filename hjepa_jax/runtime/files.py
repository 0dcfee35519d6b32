"""Files that are there whole or not at all: written beside their place, then put into it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """An open file that takes the place of `path` at the end of the block.

    It is on disk then, so that what is written later does not outlive it should the power fail.
    An error within the block leaves `path` as it was.

    Args:
      path: of the file; its folder exists.

    Raises:
      OSError: when it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place at the end of the block.

    An error within the block leaves nothing behind.

    Args:
      path: a folder that does not exist, or is empty.

    Raises:
      OSError: when it cannot be written, or is not empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        partial = Path(beside) / "partial"
        partial.mkdir()
        yield partial
        partial.rename(path)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for `folder`.

    Where the system has no such locks (Windows, some network file systems) it does not.

    Raises:
      OSError: when there is no such folder.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
