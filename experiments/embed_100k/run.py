"""Embeds many images from a folder, kills the command on the way, and looks at memory and rows.

  PYTHONPATH=. python experiments/embed_100k/run.py runs/shapes_tiny --num_images=100000

Images are drawn by `data.shapes` and written as PNG files into a temporary folder; with
--num_drawn, the others are links to them. `hjepa embed` is killed with SIGKILL when these fractions
of the shards exist, and started again each time. The csv file gets its memory every two seconds.
"""

import argparse
import csv
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

import hjepa_jax
from hjepa_jax.data.shapes import create_shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", help="a finished run of shapes_tiny")
    parser.add_argument("--num_images", type=int, default=100_000)
    parser.add_argument("--num_drawn", type=int, default=100_000)
    parser.add_argument("--kill_at", type=float, nargs="*", default=[0.2, 0.5, 0.8])
    parser.add_argument("--csv", default="memory.csv", help="file name, in the folder of this one")
    args = parser.parse_args()
    path = pathlib.Path(__file__).with_name(args.csv)
    with tempfile.TemporaryDirectory() as name, path.open("w", newline="") as file:
        root, output = pathlib.Path(name), pathlib.Path(name) / "features.parquet"
        write_images(root / "images", args.num_images, args.num_drawn)
        command = [sys.executable, "-m", "hjepa_jax.embed", f"--workdir={args.workdir}",
                   f"--input={root / 'images'}", f"--output={output}",
                   "--neighbours=5"]  # fmt: skip
        partial = output.with_name(f".{output.name}.partial")  # where `exchange.table` keeps them
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["command", "seconds", "shards", "resident_mib"])
        for number, fraction in enumerate([*args.kill_at, None], 1):
            last = None if fraction is None else fraction * args.num_images / 1024
            rows = watch(command, partial, last)
            table.writerows([number, *row] for row in rows)
            peaks = [
                max(part) for part in np.array_split([row[2] for row in rows], 10) if len(part)
            ]
            told = f"{rows[-1][0]:.0f} s, {rows[-1][1]} shards at its end, MiB in each tenth:"
            print(f"command {number}: {told}", *[f"{p:.0f}" for p in peaks], flush=True)
        check(output, root / "images", args.workdir, args.num_images)


def write_images(folder: pathlib.Path, num: int, num_drawn: int) -> None:
    """Writes `num` images as PNG files in folders of 1,000."""
    for start in range(0, num, 1000):
        part = folder / f"{start // 1000:03}"
        part.mkdir(parents=True)
        count = min(1000, num - start)
        if start >= num_drawn:
            for i in range(count):
                (part / f"{i:03}.png").hardlink_to(folder / "000" / f"{i:03}.png")
            continue
        for i, image in enumerate(create_shapes(count, 1, seed=start)[0].images):
            Image.fromarray(image).save(part / f"{i:03}.png", compress_level=1)


def watch(
    command: list[str], partial: pathlib.Path, last: float | None
) -> list[tuple[float, int, float]]:
    """Runs a command, or kills it once there are more than `last` shards.

    Returns:
      Seconds, number of shards and MiB of memory, every two seconds.
    """
    seen, start = [], time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
        except (OSError, IndexError):
            break
        shards = len(list(partial.glob("*.npz")))
        seen.append((round(time.monotonic() - start, 1), shards, round(memory, 1)))
        if last is not None and shards > last:
            process.send_signal(signal.SIGKILL)
        time.sleep(2)
    status = process.wait()
    assert status == (0 if last is None else -signal.SIGKILL), status
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
          f"{np.abs(found - expected).max():.1e}; "
          f"sheet of {output.with_suffix('.html').stat().st_size / 1024:.0f} KiB")  # fmt: skip


if __name__ == "__main__":
    main()
