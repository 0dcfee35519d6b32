"""Short runs, one healthy and five spoilt on purpose, for docs/reading-the-curves.md.

python experiments/curves/run.py [--workdir=runs/curves]
"""

import argparse
import csv
import pathlib
from typing import Any

import jax

from hjepa_jax.config import Config, base_config, build
from hjepa_jax.data.npz import save_npz
from hjepa_jax.data.shapes import create_shapes
from hjepa_jax.evaluation.features import extract_features
from hjepa_jax.evaluation.linear import linear_probe
from hjepa_jax.reporting.figures import Panel, curves, png
from hjepa_jax.runs.history import History, read_history
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.training.train import train_and_evaluate

HERE = pathlib.Path(__file__).parent
PICTURES = HERE.parent.parent / "docs" / "curves"

# The regularizer holds this model up (see `regularized`), so runs that must collapse go without it.
BARE = {"loss.regularizer": "none", "loss.summary_weight": 0.0, "optim.learning_rate": 1e-2}
CASES: dict[str, dict[str, Any]] = {
    "healthy": {},
    "collapsed": {**BARE, "optim.learning_rate": 3e-2, "optim.weight_decay": 1.0},
    "fast_ema": {**BARE, "optim.ema_momentum": (0.0, 0.0, "constant")},
    "slow_ema": BARE,
    "regularized": {"optim.learning_rate": 1e-2, "optim.ema_momentum": (0.0, 0.0, "constant")},
    "easy_masks": {  # one hidden patch among all its neighbours
        "mask.num_blocks": 1, "mask.scale": (0.015, 0.016), "mask.context_scale": (1.0, 1.0),
    },
}  # fmt: skip
# What a spoilt run is drawn beside.
BESIDE = {"collapsed": "healthy", "fast_ema": "slow_ema", "easy_masks": "healthy"}
METRICS = {
    "train/loss_level_0": ("Loss of level 0", "smooth L1"),
    "train/effective_rank": ("Effective rank of the target features", "directions"),
    "train/pred_target_cosine": ("Cosine of prediction and target", "cosine"),
    "train/target_std": ("Spread of the target features", "standard deviation"),
}


def short_config(data: str, overrides: dict[str, Any]) -> Config:
    """Returns the config of a model of two blocks, for 600 steps."""
    c = base_config()
    c.data.source, c.data.mean, c.data.std = data, (0.5,) * 3, (0.25,) * 3
    c.model.width, c.model.depth, c.model.num_heads = 48, 2, 3
    c.model.predictor_width, c.model.predictor_depth, c.model.predictor_num_heads = 32, 1, 2
    c.model.positions = "sincos2d"
    c.mask.align_level, c.mask.scale = 0, (0.09, 0.19)
    c.loss.regularizer_weight = 0.01
    c.optim.learning_rate, c.optim.warmup_epochs = 2e-3, 0.2
    c.train.batch_size, c.train.num_steps, c.train.checkpoint_every_steps = 32, 600, 600
    c.train.on_collapse, c.eval.every_epochs, c.eval.probe_at_end = "ignore", 0.0, False
    c.log.every_steps, c.log.tensorboard, c.log.report = 10, False, False
    c.update_from_flattened_dict(overrides)
    return c.lock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/curves"))
    workdir = parser.parse_args().workdir
    workdir.mkdir(parents=True, exist_ok=True)
    save_npz(workdir / "shapes.npz", *create_shapes(3000, 2000, seed=0))
    for name, overrides in CASES.items():
        train_and_evaluate(short_config(f"npz:{workdir / 'shapes.npz'}", overrides), workdir / name)
    histories = {name: read_history(workdir / name / "metrics.jsonl") for name in CASES}
    draw(histories)
    points = [
        [name, line["step"], *(f"{line[metric]:.4f}" for metric in METRICS)]
        for name, history in histories.items()
        for line in history.lines
    ]
    write_csv("curves.csv", [["run", "step", *METRICS], *points])
    rows = [row for name, h in histories.items() for row in results(workdir / name, h)]
    write_csv("results.csv", [["run", "quantity", "value"], *rows])


def write_csv(name: str, rows: list[list[Any]]) -> None:
    with (HERE / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def draw(histories: dict[str, History]) -> None:
    """Draws the healthy run by itself, and each spoilt run beside its comparison."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in ("healthy", *BESIDE):
        shown = dict.fromkeys((BESIDE.get(name, name), name))
        panels = [
            Panel(
                title,
                unit,
                {n.replace("_", " "): histories[n].series(metric) for n in shown},
                from_zero=True,
            )
            for metric, (title, unit) in METRICS.items()
        ]
        (PICTURES / f"{name}.png").write_bytes(png(curves(panels)))


def results(workdir: pathlib.Path, history: History) -> list[list[Any]]:
    """First and last values of a run, and its linear probe: run, quantity, value."""
    rows = [
        [workdir.name, f"{metric} at step {line['step']}", f"{line[metric]:.4f}"]
        for metric in METRICS
        for line in (history.lines[0], history.lines[-1])
    ]
    config = load_config(workdir)
    train, test = open_config_source(config).load()
    model, state, initial = load_state(workdir)
    embed = jax.jit(build.build_embed_fn(config, model))
    for name, params in (("last", state.target_params), ("first", initial.target_params)):
        x, test_x = (
            extract_features(embed, params, split.images, batch_size=500)["level_0"]
            for split in (train, test)
        )
        found = linear_probe(x, train.labels, test_x, test.labels, num_classes=10)
        rows.append([workdir.name, f"linear top-1 of level 0 at the {name} step", found.top1])
    return rows


if __name__ == "__main__":
    main()
