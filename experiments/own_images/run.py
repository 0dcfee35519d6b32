"""Speed of square runs before and after this work, and of streaming from original photos.

  python experiments/own_images/run.py steps --before=DIR   # DIR: a checkout of the older commit
  python experiments/own_images/run.py feed
  python experiments/own_images/run.py programs    # digests, to compare two checkouts

`steps` runs the step of cifar10_tiny on noise (32x32, uint8) in two processes that take turns.
`feed` lets two workers decode photos of 500x375, and a step of photos_224 train on them, in turns.
Rows are appended to results.csv beside this file.
"""

import argparse
import csv
import hashlib
import importlib
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image

from hjepa_jax.data.base import Source, SourceInfo
from hjepa_jax.data.order import BatchOrder
from hjepa_jax.data.records import Streaming
from hjepa_jax.data.sources import open_source
from hjepa_jax.runs.run import build_run
from hjepa_jax.runtime.provenance import source_commit

RESULTS = pathlib.Path(__file__).with_name("results.csv")
NUM_PHOTOS, SIZE = 300, (500, 375)


class Step:
    """The compiled step of a config with a smaller batch, on the images of a source."""

    def __init__(self, name: str, batch_size: int, source: Source, images, index=None):
        config = importlib.import_module(f"hjepa_jax.configs.{name}").get_config()
        with config.unlocked():
            config.train.batch_size, config.train.steps_per_call = batch_size, 1
        run = build_run(config, source)
        self._program, _ = run.compile()
        self._state, self._rest = run.create()
        self._args = (images, index, np.int32(1), run.schedules.numbers)

    def cpu_seconds(self, num_steps: int) -> float:
        """Runs some steps; returns the CPU seconds of all threads."""
        jax.block_until_ready(self._state)
        before = time.process_time()
        for _ in range(num_steps):
            self._state, self._rest = self._program(self._state, self._rest, *self._args)
        jax.block_until_ready(self._state)
        return time.process_time() - before


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def print_programs() -> None:
    """Prints a digest of the lowered steps; equal digests are equal programs."""
    for name in ("cifar10_tiny", "shapes_tiny"):
        config = importlib.import_module(f"hjepa_jax.configs.{name}").get_config()
        info = SourceInfo(512, 512, (32, 32, 3), ("one",))
        run = build_run(config, Source("noise", info, load=tuple))
        text = run.lower(steps_per_call=1, donate=False).as_text()
        print(name, hashlib.sha256(text.encode()).hexdigest(), flush=True)


def take_turns(batch_size: int) -> None:
    """The process of one checkout: a line of input is a turn; answers with images/s."""
    shape, index = (32, 32, 3), np.arange(batch_size, dtype=np.int32)[None]
    info = SourceInfo(batch_size, batch_size, shape, ("one",))
    source = Source("noise", info, load=tuple)
    step = Step("cifar10_tiny", batch_size, source, noise(batch_size, *shape), index)
    step.cpu_seconds(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(int(line) * batch_size / step.cpu_seconds(int(line)), flush=True)


def steps(before: str, batch_size: int, num_turns: int) -> list[tuple[str, str, float]]:
    """Returns images per CPU second of the two checkouts, and their ratio."""
    trees = {"before": os.path.abspath(before), "after": os.getcwd()}
    children = {}
    for name, tree in trees.items():
        command = [sys.executable, __file__, "turns", f"--batch_size={batch_size}"]
        children[name] = subprocess.Popen(
            command, cwd=tree, env=os.environ | {"PYTHONPATH": tree}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert children[name].stdout.readline() == "ready\n"
    rates = {name: [] for name in children}
    for turn in range(num_turns):
        for name in sorted(children, reverse=bool(turn % 2)):
            children[name].stdin.write("3\n")
            children[name].stdin.flush()
            rates[name].append(float(children[name].stdout.readline()))
    for child in children.values():
        child.stdin.close()
        child.wait()
    ratios = [a / b for a, b in zip(rates["after"], rates["before"], strict=True)]
    what = f"cifar10_tiny, batch {batch_size}"
    found = {f"images per CPU second, {name}": statistics.median(x) for name, x in rates.items()}
    found |= {"ratio": statistics.median(ratios), "lowest ratio": min(ratios)}
    found["highest ratio"] = max(ratios)
    return [("steps", f"{what}, {name}", value) for name, value in found.items()]


def save_photos(folder: pathlib.Path) -> None:
    """JPEG files of smooth patches with some noise, in the size of many photos of ImageNet."""
    rng = np.random.default_rng(0)
    for i in range(NUM_PHOTOS):
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8)).resize(SIZE, 3)
        noisy = np.asarray(coarse, np.int16) + rng.integers(-8, 9, (*SIZE[::-1], 3))
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        image.save(folder / f"{i:04}.jpg", quality=90)


def feed(batch_size: int, num_turns: int) -> list[tuple[str, str, float]]:
    """Returns images/s that two workers deliver, and that the step of photos_224 takes."""
    from hjepa_jax.data.streaming import read_batches

    with tempfile.TemporaryDirectory() as folder:
        save_photos(pathlib.Path(folder))
        source = open_source(
            f"images:{folder}", data_dir=None, image_size=224, streaming=Streaming("always"),
            stored_area=4.0,
        )  # fmt: skip
        records = source.records
        step = Step("photos_224", batch_size, source, noise(1, batch_size, *source.train_shape))
        step.cpu_seconds(1)
        delivered, taken = [], []
        for _ in range(num_turns):
            order = BatchOrder(len(records), 16, seed=0)
            batches = read_batches(records, order, 0, 10_000, num_workers=2)
            for _ in itertools.islice(batches, 6):  # the workers start, their buffers fill
                pass
            before, count = time.perf_counter(), 0
            for images, _ in itertools.islice(batches, 30):
                count += len(images)
            delivered.append(count / (time.perf_counter() - before))
            batches.close()
            before = time.perf_counter()
            step.cpu_seconds(1)
            taken.append(batch_size / (time.perf_counter() - before))
    ratios = [one / other for one, other in zip(delivered, taken, strict=True)]
    shape = "x".join(map(str, source.train_shape[:2]))
    found = {
        f"images/s of two workers, stored as {shape}": statistics.median(delivered),
        f"images/s of the step of photos_224, batch {batch_size}": statistics.median(taken),
        "ratio": statistics.median(ratios),
        "lowest ratio": min(ratios),
    }
    return [("feed", name, value) for name, value in found.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["steps", "feed", "turns", "programs"])
    parser.add_argument("--before")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_turns", type=int, default=9)
    args = parser.parse_args()
    if args.what in ("turns", "programs"):
        take_turns(args.batch_size) if args.what == "turns" else print_programs()
        sys.exit()
    if args.what == "steps":
        rows = steps(args.before, args.batch_size, args.num_turns)
    else:
        rows = feed(args.batch_size, args.num_turns)
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("what", "quantity", "value", "commit")] * is_new)
        for row in rows:
            writer.writerow((*row[:2], f"{row[2]:.4g}", source_commit()))
            print(*row, flush=True)
