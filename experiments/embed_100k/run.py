"""Embeds many images from a folder, kills the command on the way, and looks at memory and rows.

  PYTHONPATH=. python experiments/embed_100k/run.py runs/shapes_tiny --num_images=100000

The images are drawn by `data.shapes` and written as PNG files into a temporary folder. The command
`hjepa embed` is killed with SIGKILL after 40 % of its rows, and started again.
"""

import argparse
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

import hjepa_jax
from hjepa_jax.data.shapes import create_shapes

KILLED_AT = 0.4  # fraction of the shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", help="a finished run of shapes_tiny")
    parser.add_argument("--num_images", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root, output = pathlib.Path(name), pathlib.Path(name) / "features.parquet"
        write_images(root / "images", args.num_images)
        command = [sys.executable, "-m", "hjepa_jax.embed", f"--workdir={args.workdir}",
                   f"--input={root / 'images'}", f"--output={output}"]  # fmt: skip
        partial = output.with_name(f".{output.name}.partial")  # where `exchange.table` keeps them
        total = -(-args.num_images // 1024)
        first = watch(command, stop=lambda: len(list(partial.glob("*.npz"))) > KILLED_AT * total)
        print(f"killed after {len(list(partial.glob('*.npz')))} shards of about {total}")
        second = watch(command)
        for run, peaks in (("first", first), ("second", second)):
            tenths = [max(part) for part in np.array_split(peaks, 10) if len(part)]
            print(f"{run} command, MiB in each tenth: {' '.join(f'{p:.0f}' for p in tenths)}")
        check(output, root / "images", args.workdir, args.num_images)


def write_images(folder: pathlib.Path, num: int) -> None:
    """Writes `num` images as PNG files in folders of 1,000."""
    for start in range(0, num, 1000):
        images = create_shapes(min(1000, num - start), 1, seed=start)[0].images
        part = folder / f"{start // 1000:03}"
        part.mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(part / f"{i:03}.png", compress_level=1)


def watch(command: list[str], stop: Callable[[], bool] = lambda: False) -> list[float]:
    """Runs a command, or kills it once `stop()` holds; returns its memory over time, MiB."""
    seen = []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            seen.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
        except (OSError, IndexError):
            break
        if stop():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.5)
    process.wait()
    return seen


def check(output: pathlib.Path, images: pathlib.Path, workdir: str, num: int) -> None:
    """Compares the rows with the files, and some of them with features made in Python."""
    from pyarrow import parquet

    table = parquet.read_table(output)
    files = table["files"].to_pylist()
    assert files == sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    assert len(files) == num == len({*files})
    rows = np.random.default_rng(0).choice(num, 100, replace=False)
    expected = hjepa_jax.load(workdir).embed([images / files[row] for row in rows])["level_0"]
    found = np.array([table["level_0"][int(row)].as_py() for row in rows])
    print(f"{num} rows, each file once; largest difference of 100 rows: "
          f"{np.abs(found - expected).max():.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
