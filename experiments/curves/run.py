"""Four short runs, one healthy and three spoilt on purpose, for docs/reading-the-curves.md.

python experiments/curves/run.py [--workdir=runs/curves]
"""

import argparse
import csv
import pathlib
from typing import Any

from hjepa_jax.config import Config, base_config
from hjepa_jax.data.shapes import create_shapes
from hjepa_jax.data.sources import save_npz
from hjepa_jax.figures import Panel, curves, png
from hjepa_jax.history import History, read_history
from hjepa_jax.train import train_and_evaluate

HERE = pathlib.Path(__file__).parent
PICTURES = HERE.parent.parent / "docs" / "curves"

CASES: dict[str, dict[str, Any]] = {
    "healthy": {},
    "collapsed": {
        "loss.regularizer": "none", "loss.summary_weight": 0.0, "optim.learning_rate": 1e-2,
    },
    "fast_ema": {"optim.ema_momentum": (0.0, 0.0, "constant")},
    "easy_masks": {"mask.num_blocks": 1, "mask.align_level": 1, "mask.scale": (0.06, 0.07)},
}  # fmt: skip
METRICS = {
    "train/loss_level_0": ("Loss of level 0", "smooth L1", True),
    "train/effective_rank": ("Effective rank of the target features", "directions", True),
    "train/pred_target_cosine": ("Cosine of prediction and target", "cosine", True),
    "train/target_std": ("Spread of the target features", "standard deviation", True),
}


def short_config(data: str, overrides: dict[str, Any]) -> Config:
    """A model a quarter the size of that of shapes_tiny, for 160 steps."""
    c = base_config()
    c.data.source, c.data.mean, c.data.std = data, (0.5,) * 3, (0.25,) * 3
    c.model.width, c.model.depth, c.model.num_heads = 48, 2, 3
    c.model.predictor_width, c.model.predictor_depth, c.model.predictor_num_heads = 32, 1, 2
    c.model.positions = "sincos2d"
    c.mask.align_level, c.mask.scale = 0, (0.09, 0.19)
    c.loss.regularizer_weight = 0.01
    c.optim.learning_rate, c.optim.warmup_epochs = 2e-3, 0.2
    c.train.batch_size, c.train.num_steps, c.train.checkpoint_every_steps = 32, 160, 160
    c.eval.every_epochs, c.eval.probe_at_end = 0.0, False
    c.log.every_steps, c.log.tensorboard, c.log.report = 5, False, False
    c.update_from_flattened_dict(overrides)
    return c.lock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/curves"))
    workdir = parser.parse_args().workdir
    workdir.mkdir(parents=True, exist_ok=True)
    save_npz(workdir / "shapes.npz", *create_shapes(3000, 300, seed=0))
    for name, overrides in CASES.items():
        train_and_evaluate(short_config(f"npz:{workdir / 'shapes.npz'}", overrides), workdir / name)
    draw({name: read_history(workdir / name / "metrics.jsonl") for name in CASES})


def draw(histories: dict[str, History]) -> None:
    """One figure per run, the spoilt ones beside the healthy one, and the table of last values."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, history in histories.items():
        shown = dict.fromkeys(("healthy", name))
        panels = [
            Panel(
                title,
                unit,
                {n.replace("_", " "): histories[n].series(metric) for n in shown},
                from_zero=from_zero,
            )
            for metric, (title, unit, from_zero) in METRICS.items()
        ]
        (PICTURES / f"{name}.png").write_bytes(png(curves(panels)))
        last = [f"{history.last(metric):.4f}" for metric in METRICS]
        rows.append([name, history.last_step(), *last])
    with (HERE / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["run", "step", *METRICS], *rows])


if __name__ == "__main__":
    main()
