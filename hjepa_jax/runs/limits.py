"""Warns before the first step if few patches are visible or a step exceeds the memory."""

import sys
from typing import Any

import jax

from hjepa_jax.config import Config, build
from hjepa_jax.config.sizes import grid_of, local_sides, num_local_patches
from hjepa_jax.runtime.placement import device_bytes

MIN_VISIBLE = 0.1  # fraction of the patches


def step_bytes(program: Any) -> int | None:
    """Returns the bytes of device memory that a compiled program needs; None if unknown.

    XLA's analysis: arguments, results and temporaries. Results that reuse the memory of arguments
    count once.
    """
    try:
        sizes = program.memory_analysis()
        in_use = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        return in_use - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    except (AttributeError, NotImplementedError, RuntimeError):  # not every backend supports it
        return None


def warn_of_sizes(config: Config, num_bytes: int | None) -> None:
    """Prints one line if few patches are visible, and one if a step does not fit the memory.

    Args:
      config: config of the run.
      num_bytes: memory of one device that a step needs; None if unknown.
    """
    masks, c = build.build_masks(config), config.model
    shown = [("mask.num_context", masks.context_capacity, grid_of(config), "an image")]
    if config.data.local_views and (seen := num_local_patches(config)):
        grid = tuple(side // c.patch_size for side in local_sides(config))
        shown.append(("data.local_patches", seen, grid, "a further crop"))
    for field, num_visible, (rows, cols), what in shown:
        if num_visible < MIN_VISIBLE * rows * cols:
            _warn(
                f"{field} shows the encoder {num_visible} of the {rows * cols} patches of {what}, "
                f"{num_visible / (rows * cols):.1%}; set a fraction ({field}=0.25), or a larger "
                f"model.patch_size than {c.patch_size}"
            )
    device = jax.local_devices()[0]
    memory = device_bytes(device)
    if num_bytes and memory and num_bytes > memory:
        _warn(
            f"a step needs {num_bytes / 2**30:.1f} GiB by XLA's estimate, and each "
            f"{device.platform} device has {memory / 2**30:.1f} GiB; lower train.batch_size="
            f"{config.train.batch_size}, raise optim.accumulation_steps="
            f"{config.optim.accumulation_steps} or model.patch_size={c.patch_size}, or set "
            "model.remat=True"
        )


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
