"""Which code and machine made a result: versions of packages, commit of the source, device."""

import functools
import hashlib
import pathlib
import platform as python_platform
import subprocess

import jax

from hjepa_jax.runtime.backend import version

PACKAGE = pathlib.Path(__file__).parent.parent


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes, and on what.

    An accelerator also tells how much memory a run can have ("device memory", bytes); a CPU shares
    that of the machine with everything else, and does not.
    """
    packages = ("hjepa-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: version(name) or "not installed" for name in packages}  # run where it lies
    device = jax.local_devices()[0]
    found = {"python": python_platform.python_version(), **found, "device": device.device_kind}
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {**found, "device memory": str(memory)} if memory else found


@functools.cache
def source_digest(folder: str = "") -> str:
    """16 hexadecimal digits over the package's source files, or over those in one of its folders.

    Results that are kept carry it if their code decides what they are.
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
    """Commit of the package's own repository, marked when files differ; None where it has none."""
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
