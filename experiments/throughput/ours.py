"""Times our training step, or the whole training loop around it, and prints one line of JSON.

  python experiments/throughput/ours.py --kind=step --config=configs/cifar10_patches.py --steps=20

The images are noise: the content changes nothing about speed.
"""

import json
import pathlib
import tempfile
import time

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from hjepa_jax import cli
from hjepa_jax.config import build
from hjepa_jax.data.base import Split
from hjepa_jax.data.npz import save_npz
from hjepa_jax.runs import run
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.runs.progress import peak_memory_bytes
from hjepa_jax.runtime import backend
from hjepa_jax.training import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_KIND = flags.DEFINE_enum("kind", "step", ["step", "loop"], "What to time.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps timed.")
_WARMUP = flags.DEFINE_integer("warmup", 5, "Steps before them.")

NUM_IMAGES = 10_000


def noise_set(folder: pathlib.Path) -> str:
    """An npz file of CIFAR-10's image size, as `data.source` takes it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_IMAGES + 100, 32, 32, 3), np.uint8)
    labels = np.arange(NUM_IMAGES + 100) % 10
    path = folder / "noise.npz"
    save_npz(
        path,
        Split(images[:NUM_IMAGES], labels[:NUM_IMAGES]),
        Split(images[NUM_IMAGES:], labels[NUM_IMAGES:]),
    )
    return f"npz:{path}"


def time_step(config, num_steps: int, warmup: int) -> dict:
    """Seconds of each bare `train_step` on a batch that is there already."""
    built = run.build_run(config, run.open_config_source(config))
    tx = build.build_optimizer(config, built.schedules)
    step = build.build_train_step(config, built.model, tx, built.schedules)
    state, place = built.create()[0], built.placement
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (config.train.batch_size, 32, 32, 3), np.uint8)
    images = place.put(images, place.rows)
    placed = {"in_shardings": (place.whole, place.rows)} if place.mesh else {}
    lowered = jax.jit(step, donate_argnums=0, **placed).lower(state, images)
    started = time.perf_counter()
    compiled = lowered.compile()
    compile_sec = time.perf_counter() - started
    seconds = []
    for _ in range(warmup + num_steps):
        started = time.perf_counter()
        state, outputs = compiled(state, images)
        jax.block_until_ready((state, outputs))
        seconds.append(time.perf_counter() - started)
    flops = lowered.cost_analysis()["flops"] / config.train.batch_size
    return {"sec": seconds[warmup:], "compile_sec": compile_sec, "flops_per_image": flops}


def time_loop(config, num_steps: int, warmup: int) -> dict:
    """Seconds per step between log lines of `train_and_evaluate`, as it logs them itself.

    Lines are as far apart as the config says, at least `num_steps`: the cost of a line belongs to
    the loop. The steps before the first line, `warmup` at least, do not count.
    """
    every_steps = max(config.log.every_steps, num_steps, warmup)
    config.train.num_steps = 2 * every_steps
    config.log.every_steps = every_steps
    with tempfile.TemporaryDirectory() as workdir:
        train.train_and_evaluate(config, pathlib.Path(workdir) / "run")
        lines = read_metrics(pathlib.Path(workdir) / "run" / "metrics.jsonl")
    timed = [line for line in lines if line["step"] > every_steps]
    waits = [line["perf/data_wait_fraction"] for line in timed]
    return {
        "sec": [1 / line["perf/steps_per_sec"] for line in timed],
        "data_wait_fraction": float(np.median(waits)),
    }


def main() -> None:
    config = _CONFIG.value
    config.log.tensorboard = config.eval.probe_at_end = False
    config.eval.every_epochs = 0.0
    config.train.checkpoint_every_steps = 10**6
    measure = {"step": time_step, "loop": time_loop}[_KIND.value]
    with tempfile.TemporaryDirectory() as folder:
        config.data.source = noise_set(pathlib.Path(folder))
        backend.select_platform(config.platform, cpu_devices=config.parallel.cpu_devices)
        result = measure(config, _STEPS.value, _WARMUP.value)
    result["batch_size"] = config.train.batch_size
    result["peak_memory_bytes"] = peak_memory_bytes(jax.devices()[0])
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
