"""Which backend runs, and what it cannot do."""

import jax

from hjepa_jax.errors import InputError

# Config value -> name that JAX knows the backend by.
BACKENDS = {"cpu": "cpu", "cuda": "cuda", "metal": "METAL", "mps": "mps"}


def select_platform(platform: str) -> str:
    """Makes `platform` ("auto", "cpu", "cuda", "metal" or "mps") JAX's default backend.

    Returns:
      The name of the backend in use, lower case.

    Raises:
      InputError: when the backend is not installed or does not start.
    """
    if platform != "auto":
        # Both Apple plugins keep the CPU backend beside them only when it is asked for.
        jax.config.update("jax_platforms", ",".join(dict.fromkeys((BACKENDS[platform], "cpu"))))
    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError("platform", platform, f"this backend does not start: {reason}") from error
    return backend.lower()


def donates_buffers(backend: str) -> bool:
    """Whether the backend can reuse the memory of its arguments (Apple's plugins cannot)."""
    return backend not in ("metal", "mps")
