"""A run and its directory: built from a config, refused when the two do not belong together."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from hjepa_jax import build, metrics
from hjepa_jax.config import (
    ADDED_FIELDS,
    FREE_FIELDS,
    Config,
    base_config,
    differing_fields,
)
from hjepa_jax.data.records import Streaming
from hjepa_jax.data.sources import Source, check_size, first_line, open_source
from hjepa_jax.errors import InputError
from hjepa_jax.fields import flatten
from hjepa_jax.models.hjepa import HJEPA
from hjepa_jax.placement import Placement, make_placement
from hjepa_jax.platform import initialise, select_platform
from hjepa_jax.steps import make_run_steps
from hjepa_jax.train_state import TrainState
from hjepa_jax.validation import validate
from hjepa_jax.whole_files import replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, built; nothing is computed yet.

    Attributes:
      model: the online networks.
      schedules: length, learning rate, weight decay, EMA momentum.
      create: makes state and metrics window at step 0, laid out on the devices.
      lower: (steps_per_call, donate) to the lowered program
        `(state, window, images, index, count) -> (state, window)`, see `steps.make_run_steps`; for
        other backends than this process has, by their names in `platforms`.
      placement: where the arguments of that program live.
    """

    config: Config
    model: HJEPA
    schedules: build.Schedules
    create: Callable[[], tuple[TrainState, metrics.LogWindow]]
    lower: Callable[..., Any]
    placement: Placement


def build_run(config: Config, source: Source) -> Run:
    """Builds model, optimizer and step for the images of `source`.

    Raises:
      InputError: for a config that cannot work.
    """
    batch_size, info = config.train.batch_size, source.info
    devices, fsdp = jax.devices(), config.parallel.fsdp
    if len(devices) % fsdp:
        rule = f"must divide the number of devices, {len(devices)}"
        raise InputError("parallel.fsdp", fsdp, rule)
    placement = make_placement(devices, fsdp=fsdp)
    streamed = source.records is not None
    check_size(config.data.source, (info.num_train, *info.image_shape))
    schedules = build.build_schedules(config, source.num_images)
    if batch_size % len(devices):
        rule = f"must be a multiple of the number of devices, {len(devices)}"
        raise InputError("train.batch_size", batch_size, rule)
    model = build.build_model(config)
    tx = build.build_optimizer(config, schedules)
    train_step = build.build_train_step(config, model, tx, schedules)
    create_state = build.build_create_state(config, model, tx)

    def batch(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, *info.image_shape), jnp.uint8)

    state = jax.eval_shape(create_state)
    layout = placement.state(state)
    _, outputs = jax.eval_shape(train_step, state, batch(batch_size))
    averages = metrics.make_averages(sorted(outputs.scalars))

    def sharded_step(state: TrainState, images: Any) -> Any:
        # Forward and backward pass read whole parameters; update and EMA, each device its part.
        params, target_params = placement.gathered((state.params, state.target_params))
        state = dataclasses.replace(state, params=params, target_params=target_params)
        return train_step(state, images)

    def create() -> tuple[TrainState, metrics.LogWindow]:
        window = create_window()
        return initialise(create_state, layout), placement.put(window, placement.whole)

    def create_window() -> metrics.LogWindow:
        width = outputs.features.shape[-1]
        return metrics.empty_window(averages, batch_size=batch_size, width=width)

    def lower(
        *, steps_per_call: int, donate: bool, platforms: tuple[str, ...] | None = None
    ) -> Any:
        whole, batches = placement.whole, placement.batches
        placed = {} if whole is None else {
            "in_shardings": (layout, whole, batches if streamed else whole, batches, whole),
            "out_shardings": (layout, whole),
        }  # fmt: skip
        run_steps = jax.jit(
            make_run_steps(sharded_step), donate_argnums=(0, 1) if donate else (), **placed
        )
        images = batch(steps_per_call, batch_size) if streamed else batch(info.num_train)
        index = jax.ShapeDtypeStruct((steps_per_call, batch_size), jnp.int32)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        window = jax.eval_shape(create_window)
        traced = run_steps.trace(state, window, images, None if streamed else index, count)
        return traced.lower(lowering_platforms=platforms)

    return Run(
        config=config,
        model=model,
        schedules=schedules,
        create=create,
        lower=lower,
        placement=placement,
    )


def open_config_source(
    config: Config,
    *,
    source: str | None = None,
    data_dir: str | None = None,
    may_download: bool = True,
) -> Source:
    """The data source that the config names; `source` and `data_dir` take precedence."""
    streaming = build.build_streaming(config)
    if source and source != config.data.source:  # which has not this split and these classes
        streaming = Streaming("auto", max_labelled=config.data.max_labelled)
    return open_source(
        source or config.data.source,
        data_dir=data_dir or config.data.dir,
        image_size=config.data.image_size,
        seed=config.seed,
        streaming=streaming,
        may_download=may_download,
    )


def describe(config: Config) -> dict[str, Any]:
    """What `--dry_run` prints: sizes and length of the run, without running it."""
    validate(config)
    platform = select_platform(config.platform, cpu_devices=config.parallel.cpu_devices)
    run = build_run(config, open_config_source(config, may_download=False))
    masks = build.build_masks(config)
    state, _ = jax.eval_shape(run.create)
    trainable, target = num_params(state.params), num_params(state.target_params)
    cost = run.lower(steps_per_call=1, donate=False).cost_analysis()
    return {
        "params_total": trainable + target,
        "params_trainable": trainable,
        "num_patches": masks.num_patches,
        "num_levels": config.model.num_levels,
        "num_context": masks.context_capacity,
        "num_steps": run.schedules.num_steps,
        "steps_per_epoch": run.schedules.steps_per_epoch,
        "flops_per_image": cost["flops"] / config.train.batch_size,
        "platform": platform,
    }


def num_params(tree: Any) -> int:
    """Number of parameters in a tree of arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Refuses a directory in which this run cannot be; changes nothing.

    Raises:
      InputError: when it holds a run whose config differs in a field that matters, or could not be
        made or written.
    """
    with writing(workdir):
        if (workdir / "config.json").exists():
            _check_same_run(load_config(workdir), config, workdir)
        there = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=there):  # what access rights promise, disks may refuse
            pass


def prepare_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Makes the run's directory and writes config.json into it.

    Raises:
      InputError: see `check_workdir`; nothing is changed then.
    """
    check_workdir(config, workdir)
    path = workdir / "config.json"
    if path.exists():
        return
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((json.dumps(config.to_dict(), indent=2) + "\n").encode())


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Turns an error of the file system within the block into an InputError ("--workdir")."""
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more: not the directory's fault
        raise
    except OSError as error:
        rule = f"must be a directory that can be written ({error.strerror or first_line(error)})"
        raise InputError("--workdir", str(workdir), rule) from error


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this process: two runs in one directory would spoil each other.

    The lock is the operating system's, on the file `lock`, so that it ends with the process however
    that ends; the file says who holds it. Where there are no such locks (Windows,
    some network file systems), nothing is held.

    Raises:
      InputError: when another live process holds it, or it cannot be written ("--workdir").
    """
    if fcntl is None:
        yield
        return
    with writing(workdir):
        file = (workdir / "lock").open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            rule = f"is in use by {owner}; stop that run or choose another --workdir"
            raise InputError("--workdir", str(workdir), rule) from error
        except OSError:
            pass  # a file system without such locks
        started = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def lock_owner(workdir: pathlib.Path) -> str:
    """Which other process holds the workdir, see `locked`; empty where none does."""
    path = workdir / "lock"
    if fcntl is None or not path.exists():
        return ""
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = file.read().strip() or "another process"
            return "" if owner.startswith(f"process {os.getpid()} ") else owner
        except OSError:  # a file system without such locks
            return ""
    return ""


def _check_same_run(old: Config, new: Config, workdir: pathlib.Path) -> None:
    differing = differing_fields(old.to_dict(), new.to_dict())
    if differing:
        was, now = flatten(old.to_dict()), flatten(new.to_dict())
        changes = ", ".join(f"{f} {was.get(f)!r} -> {now.get(f)!r}" for f in differing)
        rule = f"holds a run of another config ({changes}); choose another --workdir"
        raise InputError("--workdir", str(workdir), rule)


def load_config(workdir: pathlib.Path) -> Config:
    """The config that the run in `workdir` was started with, locked and checked.

    Raises:
      InputError: when there is none, or it is not one of this version.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise InputError("--workdir", str(workdir), "holds no run (there is no config.json)")
    config = base_config().lock()
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        _check_same_fields(saved, config.to_dict())
        config.update(saved)
        validate(config)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError,
            InputError) as error:  # fmt: skip
        rule = f"its config.json is no config of this version: {first_line(error)}"
        raise InputError("--workdir", str(workdir), rule) from error
    return config


def _check_same_fields(saved: Any, defaults: dict[str, Any]) -> None:
    """A run is described by all fields: what another version lacks is known, or not guessed."""
    if not isinstance(saved, dict):
        raise TypeError("not an object")
    found, expected = flatten(saved).keys(), flatten(defaults).keys()
    missing = expected - found - {*ADDED_FIELDS}
    missing = [field for field in missing if not field.startswith(FREE_FIELDS)]
    for which, fields in (("unknown", found - expected), ("missing", missing)):
        if fields:
            raise ValueError(f"{which} {', '.join(sorted(fields))}")
