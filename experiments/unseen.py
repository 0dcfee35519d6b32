"""Trains the rows of a config file on 45,000 images and scores them on 5,000 that no run has seen.

  python experiments/unseen.py --config=experiments/recipes/flagship.py --seeds=0,1,2

No encoder is trained on the images that score it, because they would flatter it. Beside linear and
k-NN, features are scored by k-NN after whitening with the covariance of the bank, without labels.
Two commands with --part=0/2 and --part=1/2 share the work. Each finished run writes scores.csv into
its own work directory, and is not made again.
"""

import csv
import io
import pathlib
import runpy

import jax
import numpy as np
from absl import flags

from hjepa_jax import cli
from hjepa_jax.config import build
from hjepa_jax.data.base import Split
from hjepa_jax.data.npz import save_npz
from hjepa_jax.evaluation.features import extract_features, representations
from hjepa_jax.evaluation.knn import knn_probe
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.linear import linear_probe
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runtime.files import one_at_a_time, replacing
from hjepa_jax.training.sweep import Member, members
from hjepa_jax.training.train import train_and_evaluate

_CONFIG = flags.DEFINE_string("config", None, "File with get_config() and ROWS.", required=True)
_ROWS = flags.DEFINE_list("rows", None, "Some of the rows (default: all).")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Values of seed.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/unseen", "Holds all runs.")
_PART = flags.DEFINE_string("part", "0/1", "K/N: every N-th run from the K-th on.")
_UNTRAINED = flags.DEFINE_list("untrained", [], "Rows whose untrained encoder is scored too.")
_NUM_FIT = flags.DEFINE_integer("num_fit", 20_000, "Images that probes fit.")

NUM_UNSEEN = 5_000
KS = (10, 20, 50, 100)


def whiten(bank: np.ndarray, others: np.ndarray) -> list[np.ndarray]:
    """Both [n, D], centred and whitened by mean and covariance of the bank."""
    mean = bank.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(bank.T))
    scale = directions / np.sqrt(variances + 1e-3 * variances.mean())
    return [((x - mean) @ scale).astype(np.float32) for x in (bank, others)]


def write_images(config, path: pathlib.Path) -> None:
    """Writes the training images of the config's source: 5,000 of them as the test split."""
    train, _ = open_config_source(config).load()
    kept, unseen = hold_out(len(train.images), num_val=NUM_UNSEEN)
    partial = path.with_name("partial.npz")
    save_npz(partial, *(Split(train.images[rows], train.labels[rows]) for rows in (kept, unseen)))
    partial.replace(path)


def scores(member: Member, num_fit: int, *, untrained: bool) -> list[dict]:
    """Linear, k-NN and whitened k-NN of level 0, of the summary tokens and of everything."""
    model, state, initial = load_state(member.workdir)
    source = open_config_source(member.config)
    train, test = source.load()
    fit = np.random.default_rng(0).permutation(len(train.images))[:num_fit]
    labels, classes = (train.classes[fit], test.classes), len(source.info.class_names)
    embed, found = jax.jit(build.build_embed_fn(member.config, model)), []
    encoders = {"trained": state} | ({"random_init": initial} if untrained else {})
    for encoder, params in encoders.items():
        extracted = [
            extract_features(embed, params.target_params, images, batch_size=256)
            for images in (train.images[fit], test.images)
        ]
        for (pool, level, x), (_, _, y) in zip(*map(representations, extracted), strict=True):
            if pool == "mean" and level != 0:
                continue
            options = {"num_classes": classes, "num_val": 4_000}
            row = {"row": member.row, "seed": member.seed, "encoder": encoder}
            row |= {"features": f"{pool}, level {level}", "dim": x.shape[1]}
            linear = linear_probe(x, labels[0], y, labels[1], **options)
            knn = knn_probe(x, labels[0], y, labels[1], ks=KS, **options)
            u, v = whiten(x, y)
            whitened = knn_probe(u, labels[0], v, labels[1], ks=KS, **options)
            row |= {"linear": linear.top1, "knn": knn.top1, "whitened_knn": whitened.top1}
            found.append(row)
    return found


def main() -> None:
    module = runpy.run_path(_CONFIG.value)
    folder = pathlib.Path(_WORKDIR.value).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config, images = module["get_config"]().unlock(), folder / "images.npz"
    with one_at_a_time(folder):
        if not images.exists():
            write_images(config, images)
    config.data.source = f"npz:{images}"
    rows = {name: module["ROWS"][name] for name in _ROWS.value or module["ROWS"]}
    part, parts = map(int, _PART.value.split("/"))
    for member in members(config, rows, [int(s) for s in _SEEDS.value], folder)[part::parts]:
        own = member.workdir / "scores.csv"
        if own.exists():
            continue
        train_and_evaluate(member.config, member.workdir)
        found = scores(member, _NUM_FIT.value, untrained=member.row in _UNTRAINED.value)
        text = io.StringIO()
        writer = csv.DictWriter(text, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
        with replacing(own) as file:
            file.write(text.getvalue().encode())
        print(f"{member.row} seed {member.seed}:", found, flush=True)


if __name__ == "__main__":
    cli.run(main)
