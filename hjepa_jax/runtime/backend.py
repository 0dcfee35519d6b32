"""Selects the backend, and lists the limits of each backend."""

import dataclasses
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax

from hjepa_jax.errors import InputError
from hjepa_jax.runtime.user_cache import keep_compiled_programs

# Config value -> JAX's name of the backend.
BACKENDS = {
    "cpu": "cpu",
    "cuda": "cuda",
    "rocm": "rocm",
    "tpu": "tpu",
    "metal": "METAL",
    "mps": "mps",
}
PLATFORMS = ("auto", *BACKENDS)

# Environment variables with which a user of JAX chooses a backend.
CHOICES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")

# The two plugins for Apple's GPUs need different versions of jax:
# backend -> package, first version of jax that works, first newer one that does not.
PLUGINS = {"metal": ("jax-metal", (0, 4, 34), (0, 5, 1)), "mps": ("jax-mps", (0, 10), (0, 12))}

# Settings that JAX reads from the environment (JAX_ENABLE_X64=1), and the values that a run needs.
# Other values change the random numbers, so that a resumed run differs, or stop the run: metrics
# contain NaN on purpose, and steps that are not finite are counted, not raised.
SETTINGS = {
    "jax_debug_infs": False,
    "jax_debug_nans": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_disable_jit": False,
    "jax_enable_custom_prng": False,
    "jax_enable_x64": False,
    "jax_legacy_prng_key": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
    "jax_transfer_guard": "allow",
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Abilities of a backend; `str()` names its limits.

    Attributes:
      donates: it can reuse the memory of a program's arguments for the results.
      loops: loops inside a program are safe and fast; if not, each call is one training step.
      initialises: it can initialise parameters (orthogonal matrices, long random draws); if not,
        the CPU does.
      bfloat16: it computes in bfloat16; if not, `model.dtype` must be float32.
      wide_results: bfloat16 products are fastest with float32 results.
      keeps_programs: compiled programs can be cached on disk.
      sorts: it sorts arrays of any length correctly.
    """

    donates: bool = True
    loops: bool = True
    initialises: bool = True
    bfloat16: bool = True
    wide_results: bool = False
    keeps_programs: bool = True
    sorts: bool = True

    def __str__(self) -> str:
        missing = (
            (self.donates, "no donated buffers"),
            (self.loops, "one step per call"),
            (self.initialises, "parameters made on the CPU"),
            (self.bfloat16, "float32 only"),
        )
        return ", ".join(text for able, text in missing if not able)


# jax-metal is no longer developed, and its early versions crashed on bfloat16. jax-mps supports it.
_RULES = {
    "cpu": Rules(wide_results=True),
    "metal": Rules(
        donates=False,
        loops=False,
        initialises=False,
        bfloat16=False,
        keeps_programs=False,
        sorts=False,
    ),
    "mps": Rules(donates=False, loops=False, initialises=False, keeps_programs=False, sorts=False),
}


def current_rules() -> Rules:
    """Returns the rules of JAX's default backend."""
    return _RULES.get(jax.default_backend().lower(), Rules())


def quiet_tensorflow() -> None:
    """Silences the messages of TensorFlow's import. Call this before the import."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it prints a note on oneDNN at any level


def initialise(create: Callable[..., Any], *args: Any, shardings: Any = None) -> Any:
    """Compiles and runs `create` on a device that can initialise parameters; returns its result.

    Args:
      create: returns a tree of arrays.
      *args: its arguments, trees of arrays.
      shardings: a tree of the shardings of the result; None = the default device.
    """
    if current_rules().initialises:
        return jax.jit(create, out_shardings=shardings)(*args)
    with jax.default_device(jax.devices("cpu")[0]):
        made = jax.jit(create)(*args)
    return jax.device_put(made, jax.devices()[0])


def select_platform(platform: str, *, cpu_devices: int = 1) -> str:
    """Makes `platform` (one of `PLATFORMS`) JAX's default backend.

    Args:
      platform: the backend; "auto" leaves the choice to JAX.
      cpu_devices: number of virtual CPU devices. With a small model, several cores are busier if
        each computes a part of the batch than if all share one operation.

    Returns:
      The name of the selected backend, lower case.

    Raises:
      InputError: if the backend is unknown, not installed, does not work with the installed jax,
        does not start, or has no device.
    """
    if platform not in PLATFORMS:
        raise InputError("platform", platform, f"must be one of {', '.join(PLATFORMS)}")
    _check_plugins(platform)
    fix_settings()
    if platform != "auto":
        # With an Apple plugin, JAX keeps the CPU backend only if it is named too.
        jax.config.update("jax_platforms", ",".join(dict.fromkeys((BACKENDS[platform], "cpu"))))
    try:
        if cpu_devices > 1:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        backend = jax.default_backend()
        if not current_rules().initialises:
            jax.devices("cpu")  # raises with JAX_PLATFORMS=METAL, without ",cpu"
    except (RuntimeError, AssertionError) as error:  # AssertionError: CUDA found no device
        reason = next(iter(str(error).splitlines()), "JAX finds no such device here")
        chosen = {name: os.environ[name] for name in CHOICES if os.environ.get(name)}
        name, value = next(iter(chosen.items()), ("platform", platform))
        if platform != "auto":  # it overrides the environment
            name, value = "platform", platform
        raise InputError(name, value, f"this backend does not start: {reason}") from error
    if platform not in ("auto", "cpu") and backend == "cpu":  # JAX falls back silently
        rule = "JAX finds no such device here, or lacks its plugin; cpu and auto would do"
        raise InputError("platform", platform, rule)
    if current_rules().keeps_programs:
        keep_compiled_programs()
    return backend.lower()


def fix_settings() -> None:
    """Applies `SETTINGS`; prints a note on stderr if the user had chosen other values."""
    for name, value in SETTINGS.items():
        was = getattr(jax.config, name, None)  # None: not set, or unknown to this version of JAX
        was = getattr(was, "value", was)  # an enumeration
        if was not in (None, value):
            jax.config.update(name, value)
            note = f"note: {name.upper()}={was} is ignored; every run uses {value}"
            print(note, file=sys.stderr, flush=True)


def _check_plugins(platform: str) -> None:
    """Refuses an Apple plugin that is missing, conflicts with the other, or needs another jax.

    Without this check JAX prints an obscure message, or uses the CPU without a message.
    """
    installed = [name for name, (package, _, _) in PLUGINS.items() if version(package)]
    if platform in PLUGINS:
        wanted = platform
    elif platform == "auto" and installed:
        wanted = installed[0]
    else:
        return
    package, first, beyond = PLUGINS[wanted]
    remedy = f"in an environment of its own: pip install 'hjepa-jax[{wanted}]'"
    if len(installed) > 1:
        both = " and ".join(PLUGINS[name][0] for name in installed)
        remedy = " or ".join(f"pip install 'hjepa-jax[{name}]'" for name in installed)
        rule = f"{both} exclude each other; install one, in an environment of its own: {remedy}"
        raise InputError("platform", platform, rule)
    if wanted not in installed:
        raise InputError("platform", platform, f"needs {package}, {remedy}")
    found = version("jax")
    if not first <= tuple(int(n) for n in re.findall(r"\d+", found)[:3]) < beyond:
        rule = f"{package} cannot run with jax {found}; install the pair {remedy}"
        raise InputError("platform", platform, rule)


def version(package: str) -> str:
    """Returns the installed version of a package; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
