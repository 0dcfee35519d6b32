"""Where a result comes from: package versions, commit of the source, device."""

import functools
import hashlib
import pathlib
import platform as python_platform
import subprocess

import jax

from hjepa_jax.runtime.backend import version

PACKAGE = pathlib.Path(__file__).parent.parent


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the main packages, and the kind of device.

    For an accelerator, "device memory" is the memory that a run can use, in bytes.
    """
    packages = ("hjepa-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: version(name) or "not installed" for name in packages}  # run from a checkout
    device = jax.local_devices()[0]
    found = {"python": python_platform.python_version(), **found, "device": device.device_kind}
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {**found, "device memory": str(memory)} if memory else found


@functools.cache
def source_digest(folder: str = "") -> str:
    """Returns 16 hexadecimal digits of the package's source files, or of one of its folders.

    Cached results carry them, so that a change of the code invalidates the cache.
    """
    root = PACKAGE / folder
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


@functools.cache
def source_commit() -> str | None:
    """Returns the commit of the package's repository ("-dirty" if changed); None without one."""
    repository = PACKAGE.parent
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=False
        )
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None
