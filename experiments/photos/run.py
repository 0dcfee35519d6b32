"""Memory and time of a training step on the CPU, for images of several sizes.

python experiments/photos/run.py photos_96 photos_224 --batch_size=8

Prints a line for each config: name, patches, batch size, GiB that XLA plans for a step, CPU seconds
per image (of all threads, without compilation), commit. The images are noise.
"""

import argparse
import importlib
import time

import jax
import numpy as np

from hjepa_jax.config import build
from hjepa_jax.data.base import Source, SourceInfo
from hjepa_jax.data.sides import pair
from hjepa_jax.runs.limits import step_bytes
from hjepa_jax.runs.run import build_run
from hjepa_jax.runtime.provenance import source_commit

NUM_STEPS = 2


def measure(name: str, batch_size: int) -> tuple[int, float, float]:
    """Returns patches, GiB of a step, and CPU seconds per image."""
    config = importlib.import_module(f"hjepa_jax.configs.{name}").get_config()
    with config.unlocked():
        config.train.batch_size = batch_size
    shape = (*pair(config.data.image_size), 3)
    info = SourceInfo(batch_size, batch_size, shape, ("one",))
    run = build_run(config, Source("noise", info, load=tuple))
    program, _ = run.compile()
    state, window = run.create()
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), np.uint8)
    index = np.arange(batch_size, dtype=np.int32)[None]
    cpu = []
    for _ in range(1 + NUM_STEPS):
        jax.block_until_ready(state)
        before = time.process_time()
        state, window = program(state, window, images, index, np.int32(1), run.schedules.numbers)
        jax.block_until_ready(state)
        cpu.append(time.process_time() - before)
    num_bytes = step_bytes(program)
    assert num_bytes is not None
    return (
        build.build_masks(config).num_patches,
        num_bytes / 2**30,
        min(cpu[1:]) / batch_size,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    print("config,patches,batch_size,step_gib,cpu_seconds_per_image,commit")
    for each in args.configs:
        patches, gib, seconds = measure(each, args.batch_size)
        row = (each, patches, args.batch_size, f"{gib:.2f}", f"{seconds:.2f}", source_commit())
        print(",".join(map(str, row)), flush=True)
