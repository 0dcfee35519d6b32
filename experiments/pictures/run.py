"""What TensorBoard's pictures cost: seconds of a set, and the steps beside them.

python experiments/pictures/run.py [--workdir=runs/pictures]
"""

import argparse
import math
import pathlib
import shutil
import time

import numpy as np

from hjepa_jax.configs.shapes_tiny import get_config
from hjepa_jax.reporting import showcase
from hjepa_jax.reporting.showcase import Showcase
from hjepa_jax.runs.history import read_history
from hjepa_jax.training.train import train_and_evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/pictures"))
    workdir = parser.parse_args().workdir
    shutil.rmtree(workdir, ignore_errors=True)
    config = get_config()
    # Every second interval between log lines begins with pictures, whatever they take.
    config.train.num_steps, config.train.checkpoint_every_steps = 60, 60
    config.log.every_steps, config.log.figures_every_epochs = 3, 6 / 78
    config.eval.every_epochs, config.eval.probe_at_end, config.log.report = 0.0, False, False
    config.parallel.cpu_devices = 1
    showcase.MAX_SHARE = math.inf
    shown: dict[int, tuple[float, float]] = {}
    show = Showcase._show

    def timed_show(self: Showcase, state, window, step: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        show(self, state, window, step)
        shown[step] = time.perf_counter() - wall, time.process_time() - cpu

    Showcase._show = timed_show
    train_and_evaluate(config, workdir)
    print("step,seconds,seconds of CPU")
    print("\n".join(f"{step},{wall:.2f},{cpu:.2f}" for step, (wall, cpu) in shown.items()))
    steps, rates = read_history(workdir / "metrics.jsonl").series("perf/steps_per_sec")
    after = np.isin(steps - 3, list(shown))
    ratio = np.median(rates[~after]) / np.median(rates[after])
    print(f"time of a step after pictures, relative to the others (medians): {ratio:.3f}")


if __name__ == "__main__":
    main()
