"""Which backend runs, and what it cannot do."""

import ctypes
import sys

import jax

from hjepa_jax.errors import InputError

# Config value -> name that JAX knows the backend by.
BACKENDS = {"cpu": "cpu", "cuda": "cuda", "metal": "METAL", "mps": "mps"}


def select_platform(platform: str, *, cpu_devices: int = 1) -> str:
    """Makes `platform` ("auto", "cpu", "cuda", "metal" or "mps") JAX's default backend.

    Args:
      platform: which backend; "auto" leaves the choice to JAX.
      cpu_devices: devices that the CPU poses as. A small model keeps several cores busier when each
        works on a part of the batch than when all work on one operation.

    Returns:
      The name of the backend in use, lower case.

    Raises:
      InputError: when the backend is not installed or does not start.
    """
    if platform != "auto":
        # Both Apple plugins keep the CPU backend beside them only when it is asked for.
        jax.config.update("jax_platforms", ",".join(dict.fromkeys((BACKENDS[platform], "cpu"))))
    try:
        if cpu_devices > 1:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        backend = jax.default_backend()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError("platform", platform, f"this backend does not start: {reason}") from error
    if backend == "cpu":
        _keep_freed_memory()
    return backend.lower()


def donates_buffers(backend: str) -> bool:
    """Whether the backend can reuse the memory of its arguments (Apple's plugins cannot)."""
    return backend not in ("metal", "mps")


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it to the system.

    XLA on CPU allocates the temporaries of a step anew at each call; without this the kernel hands
    out and clears gigabytes of fresh pages every step.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
        mallopt(m_top_pad, 64 << 20)
        mallopt(m_arena_max, 1)
