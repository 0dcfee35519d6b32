"""What a second start of the same run need not do again: compile, and decode images.

Everything lies in `hjepa_jax` in the user's cache folder (`XDG_CACHE_HOME`, or ~/.cache), and may
be deleted at any time. Where nothing can be written there, nothing is kept.
"""

import hashlib
import os
import platform
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from hjepa_jax.runtime.files import replacing

# Larger sets would fill a home directory.
MAX_KEPT_BYTES = 2 * 1024**3
MADE_FROM = "made_from"  # name of the array that says what the others were made from


def cache_folder() -> Path:
    """The project's folder in the user's cache; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "hjepa_jax"


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles, unless the user has told it where, or not to.

    The folder is that of this kind of processor: a program compiled for another may use
    instructions that this one lacks.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        folder = cache_folder() / f"compiled-{_processor()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def kept_arrays(
    key: str,
    create: Callable[[], dict[str, np.ndarray]],
    *,
    made_from: str = "",
    folder: Path | None = None,
) -> dict[str, np.ndarray]:
    """`create()`, or what it returned when it was last called with this key and `made_from`.

    Args:
      key: names the arrays; there is one file for each key.
      create: makes them.
      made_from: all that they depend on. If it differs from that of the file, the arrays are made
        again and replace the old ones.
      folder: where they are kept; None for the user's cache.
    """
    folder = (folder or cache_folder()) / "data"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if str(file[MADE_FROM]) == made_from:
                # Reading checks their CRC.
                return {name: file[name] for name in file.files if name != MADE_FROM}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        pass
    arrays = create()
    num_bytes = sum(array.nbytes for array in arrays.values())
    if num_bytes > MAX_KEPT_BYTES:
        return arrays
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, **arrays, **{MADE_FROM: np.array(made_from)})  # pyright: ignore[reportArgumentType]
    except OSError:
        return arrays
    kept = f"kept {num_bytes / 2**20:.0f} MiB of decoded data in {path.parent}"
    print(f"{kept}; the next run starts from there", file=sys.stderr, flush=True)
    return arrays


def _processor() -> str:
    """A few hexadecimal digits that two kinds of processors do not share."""
    about = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        pass
    return hashlib.sha256(about.encode()).hexdigest()[:8]
