"""Times starts of a run with another learning rate, up to their first step.

  PYTHONPATH=. python experiments/terminal/first_step.py [--pairs=2]

A first start fills an empty cache of compiled programs. Then pairs of starts follow, at the same
rate and at another one. The difference is the cost of another rate.
"""

import argparse
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time


def start(workdir: pathlib.Path, rate: float, cache: pathlib.Path) -> float:
    """Returns the CPU seconds of a process that makes one step."""
    command = [
        sys.executable, "-m", "hjepa_jax.main", "--config=shapes_tiny", f"--workdir={workdir}",
        "--config.train.num_steps=1", f"--config.optim.learning_rate={rate}",
        "--config.eval.every_epochs=0", "--config.eval.probe_at_end=False",
        "--config.log.report=False", "--config.log.tensorboard=False",
    ]  # fmt: skip
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "step 1/1" in done.stdout, "the run ended before its first step"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    found = re.search(r"compiled in ([\d.]+) s", done.stdout)
    compiling = float(found[1]) if found else float("nan")
    seconds = time.perf_counter() - began
    print(
        f"rate {rate}: {cpu:.1f} s of CPU, {seconds:.1f} s, compiling {compiling:.1f} s", flush=True
    )
    return cpu


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=2)
    num_pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        first = start(path / "first", 8e-3, path)
        ratios = []
        for i in range(num_pairs):
            same = start(path / f"same_{i}", 8e-3, path)
            ratios.append(start(path / f"other_{i}", 4e-3 + 1e-4 * i, path) / same)
    print(
        f"first start {first:.1f} s of CPU; other rate / same rate: {statistics.median(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
