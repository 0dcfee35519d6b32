"""The origin of a result: package versions, commit of the source, device, command."""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform as python_platform
import shlex
import subprocess
import sys

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
    kind = device.device_kind if device.platform != "cpu" else _processor()
    found = {"python": python_platform.python_version(), **found, "device": kind}
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {**found, "device memory": str(memory)} if memory else found


@functools.cache
def _processor() -> str:
    """Returns the name of the processor, and its number of cores."""
    name, info = python_platform.processor() or python_platform.machine(), "/proc/cpuinfo"
    with contextlib.suppress(OSError):
        lines = pathlib.Path(info).read_text(errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = next(iter(names), name)
    return f"CPU: {name}, {os.cpu_count()} cores"


def command() -> str:
    """Returns the command line of this process, as a user would type it."""
    words = sys.orig_argv[1:]
    if words and pathlib.Path(words[0]).name == "hjepa":
        words = ["hjepa", *words[1:]]
    elif words[:2] == ["-m", "hjepa_jax"]:
        words = ["hjepa", *words[2:]]
    else:
        words = ["python", *words]
    return shlex.join(words)


@functools.cache
def source_digest(folder: str = "") -> str:
    """Returns 16 hexadecimal digits of the package's source files, or of one of its folders.

    They are part of cache keys, so that a change of the code invalidates the cache.
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
