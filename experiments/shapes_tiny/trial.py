"""One trial of a drawing and a recipe for the demo, as a row of trials.csv.

  PYTHONPATH=. python experiments/shapes_tiny/trial.py shapes.TEXTURE=0.2 data.local_views=2

Arguments set constants of `hjepa_jax.data.shapes` and fields of `configs/shapes_tiny.py`. Scores
are taken on held-out training images: the test images decide nothing.
"""

import ast
import csv
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

from hjepa_jax.config import build
from hjepa_jax.configs import shapes_tiny
from hjepa_jax.data import shapes
from hjepa_jax.evaluation.features import extract_features
from hjepa_jax.evaluation.held_out import fitted_and_scored
from hjepa_jax.evaluation.knn import knn_probe
from hjepa_jax.evaluation.linear import linear_probe
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runtime.provenance import source_commit, versions
from hjepa_jax.training.train import train_and_evaluate

RESULTS = pathlib.Path(__file__).with_name("trials.csv")
COLUMNS: tuple[str, ...] = (
    "arguments", "seconds", "linear", "knn", "linear_summary", "knn_summary", "linear_level_0",
    "knn_level_0", "random_linear", "random_knn", "pixels_knn", "commit", "hardware",
)  # fmt: skip


def main() -> None:
    config = shapes_tiny.get_config()
    config.eval.probe_at_end, config.eval.every_epochs = False, 0.0
    config.log.tensorboard, config.log.report, config.log.figures_every_epochs = False, False, 0.0
    for argument in sys.argv[1:]:
        field, _, text = argument.partition("=")
        value = text if text.isalpha() and text != "None" else ast.literal_eval(text)
        if field.startswith("shapes."):
            setattr(shapes, field.removeprefix("shapes."), value)
        else:
            config.update_from_flattened_dict({field: value})
    config.lock()
    with tempfile.TemporaryDirectory() as folder:
        workdir, began = pathlib.Path(folder), time.perf_counter()
        train_and_evaluate(config, workdir)
        seconds = time.perf_counter() - began
        model, state, initial = load_state(workdir)
        print((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    train, _ = open_config_source(config).load()
    parts = fitted_and_scored(len(train.labels), 1000, 4000)
    embed = jax.jit(build.build_embed_fn(config, model))
    y, scored_y = (train.labels[rows] for rows in parts)

    def scores(x: np.ndarray, scored_x: np.ndarray) -> tuple[str, str]:
        arrays = (x, y, scored_x, scored_y)
        linear = linear_probe(*arrays, num_classes=10, l2_grid=(0.1, 0.01, 1e-3, 1e-4))
        knn = knn_probe(*arrays, num_classes=10)
        return f"{100 * linear.top1:.1f}", f"{100 * knn.top1:.1f}"

    row = {"arguments": " ".join(sys.argv[1:]), "seconds": f"{seconds:.0f}"}
    for name, params in (("", state.target_params), ("random_", initial.target_params)):
        found = [extract_features(embed, params, train.images[p], batch_size=256) for p in parts]
        parts_of = {"all": sorted(found[0]), "summary": ["summary"], "level_0": ["level_0"]}
        for which, names in parts_of.items():
            if name and which != "all":
                continue
            suffix = "" if which == "all" else f"_{which}"
            x = [np.concatenate([f[n] for n in names], axis=1) for f in found]
            linear, knn = scores(*x)
            row |= {f"{name}linear{suffix}": linear, f"{name}knn{suffix}": knn}
    pixels = [train.images[p].reshape(len(p), -1).astype(np.float32) / 255 for p in parts]
    found = knn_probe(pixels[0], y, pixels[1], scored_y, num_classes=10)
    row |= {"pixels_knn": f"{100 * found.top1:.1f}"}
    row |= {"commit": (source_commit() or "")[:7], "hardware": versions()["device"]}
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


if __name__ == "__main__":
    main()
