"""Writes files atomically: a temporary file replaces the old one."""

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
    """Yields an open file that replaces `path` at the end of the block.

    The file is synced to disk first, so a power failure cannot lose it and keep later files.
    An error inside the block leaves `path` unchanged.

    Args:
      path: the file to replace; its folder must exist.

    Raises:
      OSError: if it cannot be written.
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
    """Yields a temporary folder that becomes `path` at the end of the block.

    An error inside the block leaves no files.

    Args:
      path: a folder that does not exist, or is empty.

    Raises:
      OSError: if it cannot be written, or is not empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        partial = Path(beside) / "partial"
        partial.mkdir()
        yield partial
        partial.rename(path)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is inside a `one_at_a_time` block for `folder`.

    Systems without file locks (Windows, some network file systems) do not wait.

    Raises:
      OSError: if the folder does not exist.
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
