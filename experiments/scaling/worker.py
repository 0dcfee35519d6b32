"""One layout, in a process of its own (or one of two): speed of the step, and its collectives.

PYTHONPATH=. python experiments/scaling/worker.py --devices=8 --fsdp=2 --batch_size=64 --steps=20
"""

import json
import time

import jax
import numpy as np
from absl import flags
from collectives import collectives

from hjepa_jax import cli
from hjepa_jax.config import Config, base_config
from hjepa_jax.data.base import Source, SourceInfo
from hjepa_jax.runs import run
from hjepa_jax.runtime import cluster
from hjepa_jax.runtime.backend import select_platform

_DEVICES = flags.DEFINE_integer("devices", 1, "Virtual devices of this process.")
_FSDP = flags.DEFINE_integer("fsdp", 1, "parallel.fsdp.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per step, global.")
_MODEL = flags.DEFINE_string("model", "small", "small | vit_small | vit_base | vit_large.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps to time; 0: compile only.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "See hjepa_jax.main.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "See hjepa_jax.main.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "See hjepa_jax.main.")

WARMUP = 3
NUM_IMAGES = 1024


def make_config(model: str) -> Config:
    """A model for this experiment: small enough for two cores, or ViT-S, B or L at 224 pixels."""
    c = base_config()
    if model == "small":
        c.model.width, c.model.depth, c.model.num_heads = 96, 2, 3
        c.model.predictor_width, c.model.predictor_depth = 48, 1
        return c
    c.data.image_size, c.model.patch_size = 224, 16
    c.model.name = model
    c.model.predictor_width, c.model.predictor_depth, c.model.predictor_num_heads = 384, 6, 12
    if model == "vit_large":
        c.model.name = "vit_base"
        c.model.width, c.model.depth, c.model.num_heads = 1024, 24, 16
    return c


def build(model: str, *, fsdp: int, batch_size: int) -> run.Run:
    """The run of a model on noise."""
    c = make_config(model)
    c.parallel.fsdp, c.train.batch_size = fsdp, batch_size
    size = c.data.image_size
    info = SourceInfo(NUM_IMAGES, NUM_IMAGES, (size, size, 3), ("noise",))
    return run.build_run(c, Source("noise", info, load=tuple))


def measure() -> dict:
    """Returns seconds of each step after the warm-up, and the exchanges in it."""
    built = build(_MODEL.value, fsdp=_FSDP.value, batch_size=_BATCH_SIZE.value)
    run_steps = built.lower(steps_per_call=1, donate=True).compile()
    result = {"collectives": collectives(run_steps.as_text())}
    if not _STEPS.value:
        return result
    rng, place = np.random.default_rng(0), built.placement
    size = built.config.data.image_size
    images = rng.integers(0, 256, (NUM_IMAGES, size, size, 3), np.uint8)
    images = place.put(images, place.whole)
    cluster.meet()
    (state, window), seconds = built.create(), []
    for _ in range(WARMUP + _STEPS.value):
        index = rng.integers(0, NUM_IMAGES, (1, _BATCH_SIZE.value)).astype(np.int32)
        index = place.put(index, place.batches)
        started = time.perf_counter()
        state, window = run_steps(
            state, window, images, index, np.int32(1), built.schedules.numbers
        )
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - started)
    leaves = jax.tree.leaves((state.params, state.target_params, state.opt_state))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return {**result, "sec": seconds[WARMUP:], "state_bytes_per_device": held}


def main() -> None:
    """Runs the command."""
    with cluster.member(
        _COORDINATOR.value, num_processes=_NUM_PROCESSES.value, process_id=_PROCESS_ID.value
    ):
        select_platform("cpu", cpu_devices=_DEVICES.value)
        print("\n" + json.dumps(measure()))


if __name__ == "__main__":
    cli.run(main)
