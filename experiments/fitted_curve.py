"""Predicts the score of a longer run by a power law fitted to a run's scores.

  PYTHONPATH=. python experiments/fitted_curve.py runs/X 100 --field=eval/knn_top1_summary

prints the fit and its prediction for epoch 100. `--until=6` uses the scores of the first six epochs
alone, to test a prediction against known scores. The curve is top-1 = a - b epoch^-c, 0 < c <= 2,
by least squares; a is its limit. The range covers the predictions of all fits without one score: it
shows the weight of single scores. It says nothing about a longer schedule or overfitting. It is a
prediction, not a result.
"""

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from hjepa_jax.config import Config
from hjepa_jax.config.build import build_schedules
from hjepa_jax.errors import InputError
from hjepa_jax.runs.history import read_history
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runs.scores import read_probe_json
from hjepa_jax.runs.workdir import load_config

EXPONENTS = np.geomspace(0.01, 2.0, 400)
MIN_SCORES = 4  # without one of them as many as the law has numbers


def scores(workdir: pathlib.Path, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and scores (percent) in a run's log, [n] each.

    Raises:
      InputError: for a workdir without a run, or if its training images cannot be read.
    """
    config = load_config(workdir)
    schedules = build_schedules(config, _num_images(workdir, config))
    steps, top1 = read_history(workdir / "metrics.jsonl").series(field)
    return steps / schedules.steps_per_epoch, 100 * top1


def _num_images(workdir: pathlib.Path, config: Config) -> int:
    """The number of training images: of the data, or if it is gone, of the run's probe table.

    A kept run may name a file that was not kept, and have been probed on a copy of its images.
    """
    try:
        return open_config_source(config).num_images
    except InputError:
        rows = read_probe_json(workdir / "probe.json")
        sizes = {(row["data"], row["train_size"]) for row in rows if "train_size" in row}
        if len(sizes) != 1:
            raise
        ((data, size),) = sizes
        print(f"{config.data.source} is not there; probe.json: {size:,} images of {data}")
        return size


def fit(epochs: np.ndarray, top1: np.ndarray) -> tuple[float, float, float]:
    """The a, b >= 0 and c of the power law nearest to the scores (least squares)."""
    best, found = np.inf, (0.0, 0.0, 0.0)
    for c in EXPONENTS:
        design = np.stack([np.ones_like(epochs), -(epochs**-c)], axis=1)
        (a, b), residual = nnls(design, top1)
        if residual < best:
            best, found = residual, (float(a), float(b), float(c))
    return found


def predict(law: tuple[float, float, float], epoch: float) -> float:
    a, b, c = law
    return a - b * epoch**-c


def predictions(epochs: np.ndarray, top1: np.ndarray, epoch: float) -> tuple[float, float, float]:
    """Returns the prediction of all scores, and the range of predictions without one."""
    without = [
        predict(fit(np.delete(epochs, i), np.delete(top1, i)), epoch) for i in range(len(epochs))
    ]
    return predict(fit(epochs, top1), epoch), min(without), max(without)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("epoch", type=float)
    parser.add_argument("--field", default="eval/knn_top1")
    parser.add_argument("--until", type=float, default=np.inf, help="last epoch that counts")
    args = parser.parse_args(argv)
    if not args.epoch > 0:
        parser.error(f"epoch={args.epoch:g}: must be above 0")
    try:
        epochs, top1 = scores(args.workdir, args.field)
    except InputError as error:
        parser.error(str(error))
    epochs, top1 = epochs[epochs <= args.until], top1[epochs <= args.until]
    if len(epochs) < MIN_SCORES:
        parser.error(
            f"{args.workdir} has {len(epochs)} scores of {args.field} up to epoch {args.until:g}; "
            f"a fit needs {MIN_SCORES}"
        )
    law = fit(epochs, top1)
    for epoch, score in zip(epochs, top1, strict=True):
        print(f"epoch {epoch:6.2f}  {score:5.1f}  fitted {predict(law, epoch):5.1f}")
    middle, low, high = predictions(epochs, top1, args.epoch)
    a, b, c = law
    print(f"{args.field} = {a:.1f} - {b:.1f} epoch^-{c:.2f}")
    print(f"predicted at epoch {args.epoch:g}: {middle:.1f} ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
