"""Speed of streaming, and its memory.

  python experiments/streaming/run.py feed   --set=DIR   # images/s: two workers, and the step
  python experiments/streaming/run.py memory --set=DIR   # over 20,000 batches

The first call makes a set of STL-10's shape in DIR: 5,000 + 8,000 + 100,000 PNG images of 96x96 in
array_record, which repeat 2,000 drawn ones. Rows are appended to results.csv beside this file.
"""

import argparse
import csv
import io
import os
import pathlib
import statistics
import time

import numpy as np
from PIL import Image

SPLITS = {"train": 5_000, "test": 8_000, "unlabelled": 100_000}
NUM_DISTINCT = 2_000
RESULTS = pathlib.Path(__file__).with_name("results.csv")


def draw_png(rng: np.random.Generator) -> bytes:
    """A picture of smooth patches with some noise: about as many bytes as one of STL-10."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((96, 96), 3)
    noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (96, 96, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_set(folder: pathlib.Path) -> None:
    """Prepares the set as TFDS would prepare STL-10, unless it is there."""
    if (folder / "stl10_like").exists():
        return
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    pngs = [draw_png(rng) for _ in range(NUM_DISTINCT)]

    class Stl10Like(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = pathlib.Path(__file__).parent

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(96, 96, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(name, num) for name, num in SPLITS.items()}

        def _generate_examples(self, name, num):
            for i in range(num):
                label = -1 if name == "unlabelled" else i % 10
                yield i, {"image": io.BytesIO(pngs[i % NUM_DISTINCT]), "label": label}

    Stl10Like(data_dir=folder, file_format="array_record").download_and_prepare()


def open_records(folder: pathlib.Path):
    """The images that stl10_small would train on, from the stand-in."""
    from hjepa_jax.data.tfds_records import TfdsRecords

    rows = np.arange(SPLITS["unlabelled"], dtype=np.int32)
    (path,) = (folder / "stl10_like").glob("*")
    return TfdsRecords(str(path), "unlabelled", ("image", "label"), (96, 96, 3), False, rows)


def feed(folder: pathlib.Path, batch_size: int, num_workers: int) -> list[dict]:
    """Returns images/s that the workers deliver, and that the step of stl10_small takes.

    In turns, so that other work on the machine falls on both.
    """
    import jax

    from hjepa_jax.configs import stl10_small
    from hjepa_jax.data.base import Source, SourceInfo
    from hjepa_jax.data.order import BatchOrder
    from hjepa_jax.data.streaming import StreamedBatches, read_batches
    from hjepa_jax.runs import run

    config = stl10_small.get_config()
    config.train.batch_size = batch_size
    records = open_records(folder)
    info = SourceInfo(5_000, 8_000, (96, 96, 3), tuple("0123456789"))
    built = run.build_run(config, Source("stl10_like", info, list, records))
    program = built.lower(steps_per_call=1, donate=True).compile()
    (state, window), numbers = built.create(), built.schedules.numbers

    order = BatchOrder(len(records), batch_size, seed=0)
    decoded = read_batches(records, order, 0, 10**6, num_workers=num_workers)
    batches = StreamedBatches(decoded, size=1, put=jax.device_put)
    seconds: dict[str, list[float]] = {"fed": [], "step": []}
    num_fed = max(1, 4_096 // batch_size)
    images, _ = batches.take(0, 1)
    state, window = jax.block_until_ready(
        program(state, window, images, None, np.int32(1), numbers)
    )
    step = 1
    for _ in range(5):
        for _ in range(8):  # what was decoded while the step ran does not count
            batches.take(step, 1)
        started = time.perf_counter()
        for _ in range(num_fed):
            images, _ = batches.take(step, 1)
        jax.block_until_ready(images)
        seconds["fed"].append((time.perf_counter() - started) / (num_fed * batch_size))
        started = time.perf_counter()
        for _ in range(2):
            state, window = jax.block_until_ready(
                program(state, window, images, None, np.int32(1), numbers)
            )
        seconds["step"].append((time.perf_counter() - started) / (2 * batch_size))
        step += 1
    batches.close()
    rates = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    worst = min(s / f for s, f in zip(seconds["step"], seconds["fed"], strict=True))
    setting = f"batch {batch_size}, {num_workers} workers"
    return [
        {"what": "feed", "setting": setting, "quantity": name, "value": f"{value:.4g}"}
        for name, value in (
            ("images/s brought to the device", rates["fed"]),
            ("images/s of the step", rates["step"]),
            ("ratio", rates["fed"] / rates["step"]),
            ("lowest ratio of five turns", worst),
        )
    ]


def memory(folder: pathlib.Path, batch_size: int, num_workers: int, num: int) -> list[dict]:
    """Resident memory of run and workers, every 2,000 batches."""
    import jax

    from hjepa_jax.data.order import BatchOrder
    from hjepa_jax.data.streaming import StreamedBatches, read_batches

    records = open_records(folder)
    order = BatchOrder(len(records), batch_size, seed=0)
    decoded = read_batches(records, order, 0, num, num_workers=num_workers)
    batches = StreamedBatches(decoded, size=1, put=jax.device_put)
    rows = []
    for step in range(num):
        batches.take(step, 1)
        if (step + 1) % (num // 10) == 0:
            shared = sum(f.stat().st_size for f in pathlib.Path("/dev/shm").glob("psm_*"))
            sizes = [resident_bytes(os.getpid()), *map(resident_bytes, children(os.getpid()))]
            for name, size in (("run", sizes[0]), ("workers", sum(sizes[1:])), ("shared", shared)):
                rows.append(
                    {
                        "what": "memory",
                        "setting": f"batch {batch_size}, {num_workers} workers",
                        "quantity": f"MiB of {name} after {step + 1} batches",
                        "value": f"{size / 2**20:.1f}",
                    }
                )
                print(rows[-1], flush=True)
    batches.close()
    return rows


def children(pid: int) -> list[int]:
    """Returns the child processes of all threads of a process."""
    lists = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for each in lists for child in each.read_text().split()]


def resident_bytes(pid: int) -> int:
    """Resident pages of a process, without those shared with others."""
    fields = pathlib.Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("feed", "memory"))
    parser.add_argument("--set", type=pathlib.Path, required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--num_batches", type=int, default=20_000)
    args = parser.parse_args()
    make_set(args.set)
    if args.what == "feed":
        rows = feed(args.set, args.batch_size, args.num_workers)
    else:
        rows = memory(args.set, args.batch_size, args.num_workers, args.num_batches)
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["what", "setting", "quantity", "value"])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row["quantity"], row["value"])


if __name__ == "__main__":
    main()
