"""Which backend runs, and what it cannot do."""

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

# Config value -> name that JAX knows the backend by.
BACKENDS = {
    "cpu": "cpu",
    "cuda": "cuda",
    "rocm": "rocm",
    "tpu": "tpu",
    "metal": "METAL",
    "mps": "mps",
}
PLATFORMS = ("auto", *BACKENDS)

# Environment variables by which a user of JAX chooses a backend.
CHOICES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")

# Apple's GPUs have two plugins, each for versions of jax that the other cannot run with:
# backend -> its package, the first jax that it runs with, and the first that it does not.
PLUGINS = {"metal": ("jax-metal", (0, 4, 34), (0, 5, 1)), "mps": ("jax-mps", (0, 10), (0, 12))}


# Settings that JAX takes from the environment (JAX_ENABLE_X64=1), and the values that a run needs.
# Other values would change its random numbers, so that a resumed run would differ; or they would
# stop it: its metrics hold NaN on purpose, and steps that are not finite are counted, not raised.
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
    """What a backend can do; `str()` names what it cannot.

    Attributes:
      donates: it can reuse the memory of a program's arguments for its results.
      loops: a loop within a program is safe and fast; else one training step per call.
      initialises: it can make parameters (orthogonal matrices, long random draws); else the CPU
        makes them.
      bfloat16: it computes in bfloat16; else `model.dtype` must be float32.
      wide_results: products of bfloat16 numbers are fastest where their results are float32.
      keeps_programs: what it compiled can be kept for the next process.
      sorts: it sorts correctly, whatever the length.
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


# jax-metal is frozen, and its early versions crashed on bfloat16; jax-mps has it.
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
    """The rules of JAX's default backend."""
    return _RULES.get(jax.default_backend().lower(), Rules())


def initialise(create: Callable[[], Any], shardings: Any = None) -> Any:
    """Calls `create`, compiled, where parameters may be made.

    Args:
      create: makes a tree of arrays.
      shardings: how they are laid out on the devices, a like tree; None: on the default device.
    """
    if current_rules().initialises:
        return jax.jit(create, out_shardings=shardings)()
    with jax.default_device(jax.devices("cpu")[0]):
        made = jax.jit(create)()
    return jax.device_put(made, jax.devices()[0])


def select_platform(platform: str, *, cpu_devices: int = 1) -> str:
    """Makes `platform` (one of `PLATFORMS`) JAX's default backend.

    Args:
      platform: which backend; "auto" leaves the choice to JAX.
      cpu_devices: devices that the CPU poses as. A small model keeps several cores busier when each
        works on a part of the batch than when all work on one operation.

    Returns:
      The name of the backend in use, lower case.

    Raises:
      InputError: when there is no such backend, or it is not installed, does not go with the
        installed jax, does not start, or has no device.
    """
    if platform not in PLATFORMS:
        raise InputError("platform", platform, f"must be one of {', '.join(PLATFORMS)}")
    _check_plugins(platform)
    fix_settings()
    if platform != "auto":
        # Both Apple plugins keep the CPU backend beside them only when it is asked for.
        jax.config.update("jax_platforms", ",".join(dict.fromkeys((BACKENDS[platform], "cpu"))))
    try:
        if cpu_devices > 1:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        backend = jax.default_backend()
        if not current_rules().initialises:
            jax.devices("cpu")  # JAX_PLATFORMS=METAL, without ",cpu", would leave us none
    except (RuntimeError, AssertionError) as error:  # JAX asserts that CUDA has found a device
        reason = next(iter(str(error).splitlines()), "JAX finds no such device here")
        chosen = {name: os.environ[name] for name in CHOICES if os.environ.get(name)}
        name, value = next(iter(chosen.items()), ("platform", platform))
        if platform != "auto":  # which goes before the environment
            name, value = "platform", platform
        raise InputError(name, value, f"this backend does not start: {reason}") from error
    if platform not in ("auto", "cpu") and backend == "cpu":  # which JAX does not say
        rule = "JAX finds no such device here, or lacks its plugin; cpu and auto would do"
        raise InputError("platform", platform, rule)
    if current_rules().keeps_programs:
        keep_compiled_programs()
    return backend.lower()


def fix_settings() -> None:
    """Gives `SETTINGS` their values; says on stderr which of them the user had set otherwise."""
    for name, value in SETTINGS.items():
        was = getattr(jax.config, name, None)  # None: not set, or not in this version of JAX
        was = getattr(was, "value", was)  # of an enumeration
        if was not in (None, value):
            jax.config.update(name, value)
            note = f"note: {name.upper()}={was} is ignored; every run uses {value}"
            print(note, file=sys.stderr, flush=True)


def _check_plugins(platform: str) -> None:
    """Refuses an Apple plugin that is absent, has a rival, or cannot run with this jax.

    Each would otherwise end in a message from deep within JAX, or in a silent run on the CPU.
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
    """The installed version of a package; "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
