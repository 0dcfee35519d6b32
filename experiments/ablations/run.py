"""One option at a time, on shapes_tiny: what is each worth?

  experiments/ablations/run.sh --row=sigreg --seed=0     # one row of results.csv, or
  experiments/ablations/run.sh                           # all that are not there yet

A row is appended to results.csv when its run is done; a run that was cut short goes on from its
newest checkpoint. Rows are scored on training images that the probes do not fit, chosen by a
fixed seed and held out of each probe's own choice of hyper-parameters too: options are compared
here, so the test images are never looked at.
"""

import argparse
import ast
import csv
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from configs import shapes_tiny
from hjepa_jax import build
from hjepa_jax.checkpoint import load_encoder
from hjepa_jax.config import Config
from hjepa_jax.evaluation.features import extract_features
from hjepa_jax.evaluation.knn import DEFAULT_KS, knn_probe
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.linear import linear_probe
from hjepa_jax.evaluation.quality import effective_rank
from hjepa_jax.history import read_history
from hjepa_jax.provenance import source_commit, versions
from hjepa_jax.run import open_config_source
from hjepa_jax.train import train_and_evaluate

HERE = pathlib.Path(__file__).parent
COLUMNS = (
    "row", "seed", "overrides", "linear", "knn", "effective_rank", "images_per_sec", "commit",
    "hardware",
)  # fmt: skip
SEEDS = (0, 1, 2)

# Every option of a config that changes what is learned, by itself; `baseline` is shapes_tiny.
ROWS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "random_init": {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.num_steps": 1},
    "mask_whole_cells": {"mask.align_level": 1, "mask.scale": (0.18, 0.25)},
    "mask_hierarchical": {"mask.kind": "hierarchical", "mask.progression": ("geometric", 1.5)},
    "mask_hierarchical_larger": {"mask.kind": "hierarchical", "mask.progression": ("linear", 2.0)},
    "mask_random_half": {"mask.kind": "random", "mask.scale": (0.5, 0.6)},
    "mask_random_cells": {
        "mask.kind": "random", "mask.scale": (0.5, 0.6), "mask.align_level": 1,
    },
    "levels_1": {"model.num_levels": 1},
    "levels_3": {"model.num_levels": 3},
    "summary_tokens_1": {"model.num_summary_tokens": 1},
    "no_summary_pass": {"loss.summary_weight": 0.0},
    "positions_learned": {"model.positions": "learned"},
    "positions_rope2d": {"model.positions": "rope2d"},
    "registers_4": {"model.num_registers": 4},
    "layer_scale": {"model.layer_scale": 0.1},
    "drop_path": {"model.drop_path": 0.1},
    "predictor_blocks": {"model.predictor_mode": "blocks"},
    "predictor_cross": {"model.predictor_mode": "cross"},
    "target_layers_2": {"model.target_layers": 2},
    "global_level": {"model.global_level": True},
    "global_level_cross_view": {"model.global_level": True, "loss.cross_view": 1.0},
    "no_regularizer": {"loss.regularizer": "none"},
    "vicreg_on_context": {"loss.regularized": "context"},
    "vicreg_on_both": {"loss.regularized": "both"},
    "vicreg_expander": {"model.expander_width": 256, "loss.regularizer_weight": 0.05},
    "sigreg": {"loss.regularizer": "sigreg", "loss.regularizer_weight": 0.02},
    "sigreg_weak": {"loss.regularizer": "sigreg", "loss.regularizer_weight": 0.002},
    "sigreg_expander": {
        "loss.regularizer": "sigreg", "loss.regularizer_weight": 0.02, "model.expander_width": 256,
    },
    "sigreg_online": {
        "loss.regularizer": "sigreg", "loss.regularizer_weight": 0.02, "model.target": "online",
        "loss.regularized": "both",
    },
    "loss_mse": {"loss.kind": "mse"},
    "loss_cosine": {"loss.kind": "cosine"},
    "ema_to_1": {"optim.ema_momentum": (0.98, 1.0, "cosine")},
    "ema_to_1_capped": {
        "optim.ema_momentum": (0.98, 1.0, "cosine"), "optim.max_ema_momentum": 0.995,
    },
    "vertical_flip": {"data.vertical_flip": 0.5},
    "blur": {"data.blur": 0.5, "data.blur_sigma": (0.1, 1.0)},
    "solarize": {"data.solarize": 0.2},
    "grayscale": {"data.grayscale": 0.2},
    "bfloat16": {"model.dtype": "bfloat16"},
}  # fmt: skip


def row_config(overrides: dict[str, Any], seed: int) -> Config:
    """shapes_tiny with the overrides of a row."""
    config = shapes_tiny.get_config()
    config.eval.probe_at_end, config.eval.every_epochs = False, 0.0
    config.log.tensorboard, config.log.report = False, False
    config.update_from_flattened_dict({"seed": seed, **overrides})
    return config.lock()


def measure(config: Config, workdir: pathlib.Path) -> dict[str, str]:
    """Trains, or goes on, and scores the target encoder on held-out training images.

    The features are those of all levels and of the summary tokens, side by side.
    """
    train_and_evaluate(config, workdir)
    speeds = [
        line.get("perf/images_per_sec") for line in read_history(workdir / "metrics.jsonl").lines
    ]
    model, params = load_encoder(workdir)
    source = open_config_source(config)
    train, _ = source.load()
    embed = jax.jit(build.build_embed_fn(config, model))
    found = extract_features(embed, params, train.images, batch_size=config.eval.batch_size)
    x, y = np.concatenate([found[name] for name in sorted(found)], axis=1), train.labels
    fit, scored = hold_out(len(y), num_val=config.eval.num_val)
    arrays = (x[fit], y[fit], x[scored], y[scored])
    options = {"num_classes": len(source.info.class_names), "num_val": config.eval.num_val}
    # As the protocol does: no more neighbours than the rows among which k is chosen.
    ks = [k for k in DEFAULT_KS if k <= len(fit) - min(config.eval.num_val, len(fit) // 5)]
    return {
        "linear": f"{100 * linear_probe(*arrays, **options).top1:.2f}",
        "knn": f"{100 * knn_probe(*arrays, ks=ks, **options).top1:.2f}",
        "effective_rank": f"{effective_rank(x[scored]):.1f}",
        "images_per_sec": f"{statistics.median([s for s in speeds if s] or [0.0]):.0f}",
    }


def hardware() -> str:
    """The device, the cores of the machine, and how many processes wanted one at the end."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{versions()['device']}, {os.cpu_count()} cores{load}"


def done_rows(results: pathlib.Path) -> set[tuple[str, str, str]]:
    """(row, seed, overrides) of what a results.csv has."""
    if not results.exists():
        return set()
    with results.open(newline="", encoding="utf-8") as file:
        return {(r["row"], r["seed"], r["overrides"]) for r in csv.DictReader(file)}


def append(results: pathlib.Path, row: dict[str, str]) -> None:
    """Adds a line to results.csv, with headings where it is the first."""
    new = not results.exists()
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows of results.csv.")
    parser.add_argument("--row", choices=ROWS, help="one row; all, if not given")
    parser.add_argument("--seed", type=int, help=f"one seed; {SEEDS}, if not given")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/ablations"))
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results.csv")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="for every row")
    arguments = parser.parse_args()
    if arguments.row is None or arguments.seed is None:
        # Each in a process of its own: nothing of one run is left to the next.
        for seed in SEEDS if arguments.seed is None else (arguments.seed,):
            for name in [arguments.row] if arguments.row else ROWS:
                command = [sys.executable, __file__, f"--row={name}", f"--seed={seed}"]
                command += [f"--workdir={arguments.workdir}", f"--results={arguments.results}"]
                subprocess.run([*command, "--set", *arguments.set], check=True)
        return
    shared = {
        field: _literal(value) for field, _, value in (s.partition("=") for s in arguments.set)
    }
    overrides = {**ROWS[arguments.row], **shared}
    about = {
        "row": arguments.row,
        "seed": str(arguments.seed),
        "overrides": " ".join(f"{field}={value}" for field, value in overrides.items()),
    }
    if tuple(about.values()) in done_rows(arguments.results):
        return
    print(*about.values(), flush=True)
    config = row_config(overrides, arguments.seed)
    found = measure(config, arguments.workdir / f"{arguments.row}_{arguments.seed}")
    made = {"commit": source_commit() or "", "hardware": hardware()}
    append(arguments.results, {**about, **found, **made})


def _literal(text: str) -> Any:
    """A Python value, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
