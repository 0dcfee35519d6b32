"""Builds a run from a config: model, training step, data, and their placement on devices."""

import dataclasses
import functools
import math
import pathlib
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hjepa_jax.config import Config, build
from hjepa_jax.config.defaults import AUTO
from hjepa_jax.config.validation import validate
from hjepa_jax.data.base import MAX_RESIDENT_BYTES, Source, SourceInfo, Split, check_size
from hjepa_jax.data.pixels import pixel_statistics
from hjepa_jax.data.records import Streaming, read_or_next
from hjepa_jax.data.rows import spread_rows
from hjepa_jax.data.sources import open_source
from hjepa_jax.errors import InputError
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.method.window import LogWindow, empty_window, make_averages, make_run_steps
from hjepa_jax.models.hjepa import HJEPA
from hjepa_jax.runs.limits import step_bytes, warn_of_sizes
from hjepa_jax.runs.progress import format_table, sizes_table
from hjepa_jax.runtime.backend import current_rules, initialise, select_platform
from hjepa_jax.runtime.paths import expand_paths
from hjepa_jax.runtime.placement import Placement, check_resident, make_placement

# Fields that change colours, which are defined for RGB in [0, 1].
COLOURS = ("brightness", "contrast", "saturation", "hue", "grayscale", "solarize")
NUM_MEASURED = 1024  # streamed images from which AUTO is computed


class Program(NamedTuple):
    """The compiled `run_steps` (see `Run.lower`), and the largest number of steps per call."""

    run_steps: Any
    size: int


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run; nothing is computed yet.

    Attributes:
      config: the config of the run.
      model: the online networks.
      schedules: length, learning rate, weight decay, EMA momentum.
      state_shapes: shapes and types of the state.
      create: returns state and metrics window at step 0, placed on the devices.
      lower: `lower(steps_per_call, donate)` returns the lowered program
        `(state, window, images, index, count, schedules.numbers) -> (state, window)`, see
        `make_run_steps`. The schedules are arguments, so runs with other learning rates or another
        length share one program. `platforms` names other backends to lower for.
      placement: layout of the arguments of that program.
      batch_shape: (batch_size,), or with gradient accumulation (parts, images per part).
    """

    config: Config
    model: HJEPA
    schedules: build.Schedules
    state_shapes: TrainState
    create: Callable[[], tuple[TrainState, LogWindow]]
    lower: Callable[..., Any]
    placement: Placement
    batch_shape: tuple[int, ...]

    def compile(self) -> Program:
        """Returns the compiled program."""
        rules = current_rules()
        size = self.config.train.steps_per_call if rules.loops else 1
        size = min(size, self.schedules.num_steps)
        return Program(self.lower(steps_per_call=size, donate=rules.donates).compile(), size)


def build_run(config: Config, source: Source) -> Run:
    """Builds model, optimizer and step for the images of `source`.

    Raises:
      InputError: if the config cannot work with these images or devices.
    """
    info, streamed = source.info, source.records is not None
    batch_size, num_parts = config.train.batch_size, config.optim.accumulation_steps
    check_size(config.data.source, (info.num_train, info.image_bytes))
    if not streamed:
        if (num_bytes := info.num_train * source.train_bytes) > MAX_RESIDENT_BYTES:
            rule = f"needs {num_bytes / 2**30:.1f} GiB of memory for crops, and 8 GiB fit; lower it"
            raise InputError("data.stored_area", config.data.stored_area, f"{rule}, or stream")
        check_resident(config.data.source, info.num_train * source.train_bytes)
    _check_colours(config, info)
    placement = _make_placement(config)
    schedules = build.build_schedules(config, source.num_images)
    model = build.build_model(config)
    # jax.jit caches its traces, so that `eval_shape` below and the program share one trace. With
    # `inline` the program is the same as without this jit.
    train_step = jax.jit(functools.partial(_train_step, config, model, schedules), inline=True)
    create_state = functools.partial(build.initial_state, config, model, schedules)
    create_state = jax.jit(create_state, inline=True)
    batch_shape = (batch_size,) if num_parts == 1 else (num_parts, batch_size // num_parts)

    def images_like(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, *source.train_shape), info.dtype)

    state = jax.eval_shape(create_state, schedules.numbers)
    layout = placement.state(state)
    _, outputs = jax.eval_shape(train_step, schedules.numbers, state, images_like(*batch_shape))
    averages, width = make_averages(sorted(outputs.scalars)), outputs.features.shape[-1]

    def create_window() -> LogWindow:
        return empty_window(averages, batch_size=batch_size, width=width)

    def create() -> tuple[TrainState, LogWindow]:
        window = create_window()
        state = initialise(create_state, schedules.numbers, shardings=layout)
        return state, placement.put(window, placement.whole)

    def sharded_step(numbers: Any, state: TrainState, images: Any) -> Any:
        # Forward and backward pass need full parameters. The update works on sharded parameters.
        params, target_params = placement.gathered((state.params, state.target_params))
        state = dataclasses.replace(state, params=params, target_params=target_params)
        return train_step(numbers, state, images)

    def lower(
        *, steps_per_call: int, donate: bool, platforms: tuple[str, ...] | None = None
    ) -> Any:
        whole, batches = placement.whole, placement.batches_of(batch_shape)
        placed = {} if whole is None else {
            "in_shardings": (layout, whole, batches if streamed else whole, batches, whole, whole),
            "out_shardings": (layout, whole),
        }  # fmt: skip
        donated = (0, 1) if donate else ()

        def run_steps(*args: Any) -> Any:
            *rest, numbers = args
            return make_run_steps(functools.partial(sharded_step, numbers))(*rest)

        run_steps = jax.jit(run_steps, donate_argnums=donated, **placed)
        shape = (steps_per_call, *batch_shape)
        images = images_like(*shape) if streamed else images_like(info.num_train)
        index = None if streamed else jax.ShapeDtypeStruct(shape, jnp.int32)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        window = jax.eval_shape(create_window)
        traced = run_steps.trace(state, window, images, index, count, schedules.numbers)
        return traced.lower(lowering_platforms=platforms)

    return Run(config, model, schedules, state, create, lower, placement, batch_shape)


def _train_step(
    config: Config, model: HJEPA, schedules: build.Schedules, numbers: Any, *args: Any
) -> Any:
    """Runs the training step with `numbers` as the numbers of the schedules."""
    schedules = schedules.with_numbers(numbers)
    tx = build.build_optimizer(config, schedules)
    return build.build_train_step(config, model, tx, schedules)(*args)


def _check_colours(config: Config, info: SourceInfo) -> None:
    """Refuses changes of colour for images that are not RGB."""
    if info.image_shape[2] == 3 and info.dtype != "float32":
        return
    changes = [name for name in COLOURS if config.data[name]]
    if changes:
        off = ", ".join(f"data.{name}=0" for name in changes)
        rule = f"needs three channels of uint8 or uint16, not {info.image_shape[2]} of {info.dtype}"
        raise InputError(f"data.{changes[0]}", config.data[changes[0]], f"{rule}; set {off}")


def with_statistics(config: Config, source: Source, train: Split | None) -> Config:
    """Returns the config with numbers for `data.mean` and `data.std` if they are `AUTO`.

    Args:
      config: the config.
      source: its data source.
      train: training images; None = not loaded, the numbers are 0 and 1 for each channel.
    """
    wanted: list[Any] = [name for name in ("mean", "std") if config.data[name] == AUTO]
    if not wanted:
        return config
    channels = source.info.image_shape[2]
    found = (0.0,) * channels, (1.0,) * channels
    if train is not None:
        images = train.images
        if (records := source.records) is not None:
            rows = spread_rows(np.arange(len(records)), NUM_MEASURED)
            images = np.stack([read_or_next(records, int(row))[0] for row in rows])
        found = pixel_statistics(images)
    values = {"mean": found[0], "std": found[1]}
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name in wanted:
            config.data[name] = values[name]
    validate(config)
    return config.lock()


def _make_placement(config: Config) -> Placement:
    """Returns the placement on all devices, which must divide the batch.

    Raises:
      InputError: if they do not ("parallel.fsdp", "train.batch_size").
    """
    devices, fsdp = jax.devices(), config.parallel.fsdp
    batch_size, num_parts = config.train.batch_size, config.optim.accumulation_steps
    if len(devices) % fsdp:
        rule = f"must divide the number of devices, {len(devices)}"
        raise InputError("parallel.fsdp", fsdp, rule)
    if batch_size % (len(devices) * num_parts):
        rule = f"must be a multiple of the number of devices, {len(devices)}"
        if num_parts > 1:
            rule += f", times optim.accumulation_steps, {num_parts}"
        raise InputError("train.batch_size", batch_size, rule)
    return make_placement(devices, fsdp=fsdp)


def open_config_source(
    config: Config,
    *,
    source: str | None = None,
    data_dir: str | None = None,
    may_download: bool = True,
    quiet: bool = False,
) -> Source:
    """Opens the data source of the config; `source` and `data_dir` take precedence.

    Raises:
      InputError: see `open_source`.
    """
    streaming, stored_area = build.build_streaming(config), config.data.stored_area
    if source and source != config.data.source:  # another set, for evaluation only
        streaming, stored_area = Streaming("auto", max_labelled=config.data.max_labelled), 1.0
    return open_source(
        source or config.data.source,
        data_dir=data_dir or config.data.dir,
        image_size=config.data.image_size,
        seed=config.seed,
        streaming=streaming,
        follow_links=config.data.follow_links,
        num_channels=next((len(v) for v in (config.data.mean, config.data.std) if v != AUTO), None),
        may_download=may_download,
        stored_area=stored_area,
        quiet=quiet,
    )


def describe(config: Config) -> dict[str, Any]:
    """Returns sizes and length of the run, for `--dry_run`; warns like a run."""
    validate(config)
    config = expand_paths(config)
    platform = select_platform(config.platform, cpu_devices=config.parallel.cpu_devices)
    source = open_config_source(config, may_download=False)
    config = with_statistics(config, source, None)
    run = build_run(config, source)
    num_bytes = step_bytes(run.compile().run_steps)
    warn_of_sizes(config, num_bytes)
    if config.optim.accumulation_steps > 1:  # XLA's cost analysis counts a loop body once
        whole = config.copy_and_resolve_references()
        whole.optim.accumulation_steps = 1
        run = build_run(whole, source)
    with jax.default_device(_cpu()):  # CUDA's cost analysis misses the matrix products
        cost = run.lower(steps_per_call=1, donate=False).cost_analysis()
    return {
        **sizes(run, source),
        "flops_per_image": cost["flops"] / config.train.batch_size,
        "step_bytes": num_bytes,
        "platform": platform,
    }


def sizes(run: Run, source: Source) -> dict[str, Any]:
    """Returns the length of a run, and the sizes of its networks, state and resident images."""
    masks = build.build_masks(run.config)
    state = run.state_shapes
    trainable, target = num_params(state.params), num_params(state.target_params)
    resident = source.records is None  # else the images are streamed
    return {
        "params_total": trainable + target,
        "params_trainable": trainable,
        "num_patches": masks.num_patches,
        "num_levels": run.config.model.num_levels,
        "num_context": masks.context_capacity,
        "num_steps": run.schedules.num_steps,
        "steps_per_epoch": run.schedules.steps_per_epoch,
        "images_per_update": run.config.train.batch_size,
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        "images_bytes": resident * source.info.num_train * source.train_bytes,
    }


def start_table(run: Run, source: Source, workdir: pathlib.Path) -> str:
    """Returns the table at the start of a run."""
    c, info = run.config, source.info
    lines = {"workdir": str(workdir)}
    if c.log.tensorboard:
        lines["curves"] = f"tensorboard --logdir {shlex.quote(str(workdir))}"
    (height, width, _), num_classes = source.train_shape, len(info.class_names)
    lines["data"] = (
        f"{c.data.source}: {source.num_images:,} training images of {height}x{width}, "
        + {0: "no labels", 1: "one class"}.get(num_classes, f"{num_classes} classes")
    )
    if c.eval.every_epochs and (c.eval.data or num_classes > 1):
        whose = c.eval.data or "training"
        lines["k-NN"] = f"top-1 on held-out {whose} images; training itself sees no labels"
    return format_table(lines | sizes_table(sizes(run, source)))


def _cpu() -> Any:
    """Returns the CPU device; None if JAX has no CPU backend (JAX_PLATFORMS=cuda)."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return None


def num_params(tree: Any) -> int:
    """Returns the number of parameters in a tree of arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
