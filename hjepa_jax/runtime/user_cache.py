"""Caches compiled programs and decoded images for the next start.

The cache is the folder `hjepa_jax` in the user's cache folder (`XDG_CACHE_HOME`, or ~/.cache). It
may be deleted at any time. If it cannot be written, nothing is cached.
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

# Larger data sets would fill a home directory.
MAX_KEPT_BYTES = 2 * 1024**3
MADE_FROM = "made_from"  # name of the array that identifies the origin of the others


def cache_folder() -> Path:
    """Returns the project's folder in the user's cache; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "hjepa_jax"


def keep_compiled_programs() -> None:
    """Makes JAX cache compiled programs, unless the user has configured this cache.

    Each kind of processor has its own folder, because a program for another kind may use
    instructions that this one does not have. JAX before 0.6 gets no cache: with 0.5.0 on CPU,
    cached programs corrupted the memory of resumed runs.
    """
    if jax.__version_info__ < (0, 6):
        return
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
    """Returns `create()`, or its cached result for this key and `made_from`.

    Args:
      key: name of the arrays; each key has one file.
      create: makes the arrays.
      made_from: description of everything that the arrays depend on. If it differs from the
        description in the file, the arrays are created again and the file is replaced.
      folder: cache folder; None = the user's cache.
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
    """Returns 8 hexadecimal digits that identify the kind of processor."""
    about = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        pass
    return hashlib.sha256(about.encode()).hexdigest()[:8]
