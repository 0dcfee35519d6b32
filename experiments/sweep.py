"""Runs that differ in a few fields, compared on held-out training images.

  python experiments/sweep.py experiments/ablations/shapes.py --row=sigreg --seed=0   # one row, or
  python experiments/sweep.py experiments/ablations/shapes.py       # all that are not there yet

A sweep is a Python file with these names: CONFIG, a file in configs/; ROWS, overrides by the name
of a row; optionally SHARED, overrides of every row; SEEDS; NUM_FIT, the number of training images
that the probes fit. Its results are in a csv file beside it, with the same name. A row may name
another row in `train.init_from`, and then starts from its parameters, with the same seed.

A row is appended when its run is done; an interrupted run continues from its newest checkpoint.
Rows are scored on training images chosen by a fixed seed. The probes neither fit these images nor
choose hyper-parameters on them. Test images are never looked at, because options are compared here.
"""

import argparse
import ast
import csv
import hashlib
import importlib
import os
import pathlib
import runpy
import statistics
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from hjepa_jax.config import Config, build
from hjepa_jax.evaluation.features import extract_features
from hjepa_jax.evaluation.knn import DEFAULT_KS, knn_probe
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.linear import linear_probe
from hjepa_jax.evaluation.quality import effective_rank
from hjepa_jax.runs.history import read_history
from hjepa_jax.runs.load import load_encoder
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runtime.provenance import source_commit, versions
from hjepa_jax.training.train import train_and_evaluate

# The first five identify a row.
COLUMNS = (
    "row", "seed", "config", "overrides", "num_fit", "linear", "knn", "linear_level_0",
    "knn_level_0", "effective_rank", "images_per_sec", "commit", "hardware",
)  # fmt: skip
START = "train.init_from"  # in a sweep the name of a row, in the program a directory
Sweep = dict[str, Any]


def read_sweep(path: pathlib.Path) -> Sweep:
    """Returns the constants of a sweep's file, with defaults."""
    return {"SHARED": {}, "SEEDS": (0, 1, 2), "NUM_FIT": None, **runpy.run_path(str(path))}


def row_config(sweep: Sweep, overrides: dict[str, Any], seed: int) -> Config:
    """The sweep's config with `overrides`, and without evaluation, TensorBoard and report."""
    config = importlib.import_module(f"hjepa_jax.configs.{sweep['CONFIG']}").get_config()
    config.eval.probe_at_end, config.eval.every_epochs = False, 0.0
    config.log.tensorboard, config.log.report, config.log.figures_every_epochs = False, False, 0.0
    config.update_from_flattened_dict({"seed": seed, **overrides})
    return config.lock()


def fitted_and_scored(
    num_images: int, num_val: int, num_fit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Training images that probes fit (`num_fit` at most; None: all others) and are scored on."""
    fit, scored = hold_out(num_images, num_val=num_val)
    return np.sort(np.random.default_rng(0).permutation(fit)[:num_fit]), scored


def measure(config: Config, workdir: pathlib.Path, num_fit: int | None) -> dict[str, str]:
    """Trains, or goes on, and scores the target encoder on held-out training images.

    `linear` and `knn` are of all levels and the summary tokens, side by side.
    """
    train_and_evaluate(config, workdir)
    speeds = [
        line.get("perf/images_per_sec") for line in read_history(workdir / "metrics.jsonl").lines
    ]
    model, params = load_encoder(workdir)
    source = open_config_source(config)
    train, _ = source.load()
    fit, scored = fitted_and_scored(len(train.labels), config.eval.num_val, num_fit)
    # Embeds only the rows that a probe fits, then the rows that score it.
    rows = np.concatenate([fit, scored])
    embed = jax.jit(build.build_embed_fn(config, model))
    found = extract_features(embed, params, train.images[rows], batch_size=config.eval.batch_size)
    everything = np.concatenate([found[name] for name in sorted(found)], axis=1)
    # As the protocol does: no more neighbours than the rows among which k is chosen.
    chosen_from, _ = hold_out(len(fit), num_val=config.eval.num_val)
    ks = [k for k in DEFAULT_KS if k <= len(chosen_from)]
    options = {"num_classes": len(source.info.class_names), "num_val": config.eval.num_val}
    labels = np.split(train.labels[rows], [len(fit)])

    def scores(features: np.ndarray, suffix: str = "") -> dict[str, str]:
        x, test_x = np.split(features, [len(fit)])
        arrays = (x, labels[0], test_x, labels[1])
        linear, knn = linear_probe(*arrays, **options), knn_probe(*arrays, ks=ks, **options)
        return {
            f"linear{suffix}": f"{100 * linear.top1:.2f}",
            f"knn{suffix}": f"{100 * knn.top1:.2f}",
        }

    return {
        **scores(everything),
        **scores(found["level_0"], "_level_0"),
        "effective_rank": f"{effective_rank(everything[len(fit) :]):.1f}",
        "images_per_sec": f"{statistics.median([s for s in speeds if s] or [0.0]):.0f}",
    }


def hardware() -> str:
    """The device, the cores of the machine, and how many processes wanted one at the end."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{versions()['device']}, {os.cpu_count()} cores{load}"


def done_rows(results: pathlib.Path) -> set[tuple[str, ...]]:
    """Returns (row, seed, config, overrides, num_fit) of each row in a csv file.

    Raises:
      ValueError: for a file with other columns.
    """
    if not results.exists():
        return set()
    with results.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(COLUMNS):
            raise ValueError(f"{results}: has the columns {reader.fieldnames}, not {COLUMNS}")
        return {tuple(row[name] for name in COLUMNS[:5]) for row in reader}


def append(results: pathlib.Path, row: dict[str, str]) -> None:
    """Adds a line to the results; a new file gets headings first."""
    new = not results.exists()
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def described(sweep: Sweep, overrides: dict[str, Any]) -> str:
    """Returns the overrides as text, with the overrides of the row that this one starts from."""
    text = " ".join(f"{field}={value}" for field, value in overrides.items())
    first = overrides.get(START)
    return text if first is None else f"{text} ({described(sweep, sweep['ROWS'][first])})"


def row_workdir(sweep: Sweep, name: str, seed: int, overrides: dict[str, Any]) -> pathlib.Path:
    """Returns the work directory of a row; another config is another directory."""
    digest = hashlib.sha256(described(sweep, overrides).encode()).hexdigest()[:8]
    return pathlib.Path("runs/sweeps") / f"{sweep['CONFIG']}_{name}_{seed}_{digest}"


def train_first(
    sweep: Sweep, overrides: dict[str, Any], seed: int, changed: dict[str, Any]
) -> dict[str, Any]:
    """Trains the rows that this one starts from, and returns the override that names the last."""
    name = overrides.get(START)
    if name is None:
        return {}
    first = {**sweep["SHARED"], **sweep["ROWS"][name], **changed}
    workdir = row_workdir(sweep, name, seed, first)
    started = train_first(sweep, first, seed, changed)
    train_and_evaluate(row_config(sweep, {**first, **started}, seed), workdir)
    return {START: str(workdir)}


def make_row(
    sweep: Sweep, name: str, seed: int, changed: dict[str, Any], results: pathlib.Path
) -> None:
    """Trains and scores one row, unless the results have it."""
    overrides = {**sweep["SHARED"], **sweep["ROWS"][name], **changed}
    about = {
        "row": name,
        "seed": str(seed),
        "config": sweep["CONFIG"],
        "overrides": described(sweep, overrides),
        "num_fit": str(sweep["NUM_FIT"] or "all"),
        "commit": source_commit() or "",  # before training: the code on disk may change meanwhile
    }
    if tuple(about[column] for column in COLUMNS[:5]) in done_rows(results):
        print(f"{name} {seed}: {results} has it; --results=OTHER.csv makes it again", flush=True)
        return
    print(*about.values(), flush=True)
    started = train_first(sweep, overrides, seed, changed)
    config = row_config(sweep, {**overrides, **started}, seed)
    found = measure(config, row_workdir(sweep, name, seed, overrides), sweep["NUM_FIT"])
    append(results, {**about, **found, "hardware": hardware()})


def main() -> int:
    parser = argparse.ArgumentParser(description="Rows of a sweep.")
    parser.add_argument("sweep", type=pathlib.Path, help="file with CONFIG and ROWS")
    parser.add_argument("--row", help="one row; all, if not given")
    parser.add_argument("--seed", type=int, help="one seed; all of the sweep, if not given")
    parser.add_argument(
        "--results", type=pathlib.Path, help="the csv file, if not beside the sweep"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="for every row")
    arguments = parser.parse_args()
    sweep = read_sweep(arguments.sweep)
    if arguments.row not in (None, *sweep["ROWS"]):
        parser.error(f"--row={arguments.row}: must be one of {', '.join(sweep['ROWS'])}")
    if arguments.row is not None and arguments.seed is not None:
        pairs = (text.partition("=") for text in arguments.set)
        changed = {field: _literal(value) for field, _, value in pairs}
        results = arguments.results or arguments.sweep.with_suffix(".csv")
        make_row(sweep, arguments.row, arguments.seed, changed, results)
        return 0
    # Each in a process of its own: nothing of one run is left to the next, and one that fails is
    # told of at the end.
    failed = []
    for seed in sweep["SEEDS"] if arguments.seed is None else (arguments.seed,):
        for name in [arguments.row] if arguments.row else sweep["ROWS"]:
            command = [sys.executable, __file__, *sys.argv[1:], f"--row={name}", f"--seed={seed}"]
            if subprocess.run(command, check=False).returncode:
                failed.append(f"{name} {seed}")
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return bool(failed)


def _literal(text: str) -> Any:
    """A Python value, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())
