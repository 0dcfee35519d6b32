"""How long the probes take on features of CIFAR-10's size: D = 192, 50,000 and 10,000 rows.

  python experiments/probe_speed/run.py [--protocol=knn|linear|quality]

The features are ten Gaussian clouds of unequal spread, close enough that no probe is perfect.
Prints seconds and the growth of the process's peak memory over the features themselves.
"""

import resource
import time

import numpy as np
from absl import app, flags

from hjepa_jax.evaluation import protocols
from hjepa_jax.evaluation.knn import DEFAULT_KS, knn_probe
from hjepa_jax.evaluation.linear import DEFAULT_L2_GRID, linear_probe

_PROTOCOL = flags.DEFINE_enum("protocol", "knn", ["knn", "linear", "quality"], "What to time.")


def clouds(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features `[n, 192]` float32 and classes."""
    shared = np.random.default_rng(0)
    spread = np.geomspace(1, 0.03, 192)
    centres = 0.2 * shared.normal(size=(10, 192)) * spread
    rng = np.random.default_rng(seed)
    y = rng.integers(10, size=n).astype(np.int32)
    return (centres[y] + rng.normal(size=(n, 192)) * spread).astype(np.float32), y


def peak_gib() -> float:
    """Largest memory of this process so far (Linux: ru_maxrss is in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(_):
    train, test = clouds(50_000, 1), clouds(10_000, 2)
    before, started = peak_gib(), time.perf_counter()
    if _PROTOCOL.value == "knn":
        result = knn_probe(*train, *test, num_classes=10)
        what = f"{len(DEFAULT_KS)} values of k, top-1 {result.top1:.3f} at k = {result.chosen_k}"
    elif _PROTOCOL.value == "linear":
        result = linear_probe(*train, *test, num_classes=10)
        what = f"{len(DEFAULT_L2_GRID)} penalties, top-1 {result.top1:.3f}"
    else:
        what = protocols.judge_quality(train[0])["verdict"]
    seconds = time.perf_counter() - started
    print(f"{_PROTOCOL.value}: {seconds:.1f} s, {peak_gib() - before:.2f} GiB more; {what}")


if __name__ == "__main__":
    app.run(main)
