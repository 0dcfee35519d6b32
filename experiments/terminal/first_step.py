"""Times the first start of a run, and a start with another learning rate, up to their first step.

  PYTHONPATH=. python experiments/terminal/first_step.py [--pairs=3]

The two starts of a pair follow each other in processes of their own, and share a cache of compiled
programs that is empty before the first one.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time


def start(workdir: pathlib.Path, rate: float, cache: pathlib.Path) -> tuple[float, float]:
    """Returns the seconds from the start of a process to its first step, and those of compiling."""
    command = [
        sys.executable, "-m", "hjepa_jax.main", "--config=shapes_tiny", f"--workdir={workdir}",
        "--config.train.num_steps=1", f"--config.optim.learning_rate={rate}",
        "--config.eval.every_epochs=0", "--config.eval.probe_at_end=False",
        "--config.log.report=False",
    ]  # fmt: skip
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}
    began, compiling = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"compiled in ([\d.]+) s", line):
                compiling = float(found[1])
            if "step 1/1" in line:
                return time.perf_counter() - began, compiling
    raise RuntimeError("the run ended before its first step")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    ratios = []
    for _ in range(parser.parse_args().pairs):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            first, compiling = start(path / "first", 8e-3, path)
            other, again = start(path / "other", 4e-3, path)
        ratios.append(other / (first - compiling))
        print(
            f"first start {first:.1f} s, of them compiling {compiling:.1f} s; "
            f"other rate {other:.1f} s, compiling {again:.1f} s"
        )
    print(f"other rate / (first start - compiling): {statistics.median(ratios):.2f} (median)")


if __name__ == "__main__":
    main()
