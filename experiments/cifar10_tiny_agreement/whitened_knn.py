"""k-NN of a run's features as they are, centred, and whitened: on held-out training images.

  PYTHONPATH=. python experiments/cifar10_tiny_agreement/whitened_knn.py WORKDIR [--num_bank=20000]

Whitening uses the features of the bank and no labels. Cosine similarity hardly sees directions of
little variance; a linear probe does. So the gain by whitening shows how well these directions
separate the classes. The protocol of the probes takes features as they are.
"""

import argparse
import pathlib

import jax
import numpy as np

from experiments.unseen import KS, whiten
from hjepa_jax.config import build
from hjepa_jax.evaluation.features import extract_features
from hjepa_jax.evaluation.knn import knn_predict
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.runs import run
from hjepa_jax.runs.load import load_encoder
from hjepa_jax.runs.workdir import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--num_bank", type=int, default=20_000)
    args = parser.parse_args()
    config = load_config(args.workdir)
    source = run.open_config_source(config)
    train, _ = source.load()
    fit, held_out = hold_out(len(train.images), num_val=config.eval.num_val)
    bank = fit[: args.num_bank]
    rows = np.concatenate([bank, held_out])
    model, params = load_encoder(args.workdir)
    embed = jax.jit(build.build_embed_fn(config, model))
    features = extract_features(
        embed, params, train.images[rows], batch_size=config.eval.batch_size, what="features"
    )
    for name, x in features.items():
        centred = x - x[: len(bank)].mean(axis=0)
        whitened = np.concatenate(whiten(x[: len(bank)], x[len(bank) :]))
        for what, changed in (("as they are", x), ("centred", centred), ("whitened", whitened)):
            predicted = knn_predict(
                changed[: len(bank)], train.labels[bank], changed[len(bank) :],
                ks=KS, num_classes=len(source.info.class_names),
            )  # fmt: skip
            top1 = (predicted == train.labels[held_out]).mean(axis=1)
            scores = " ".join(f"k={k}: {100 * t:.1f}" for k, t in zip(KS, top1, strict=True))
            print(f"{name:10} {what:12} {scores}")


if __name__ == "__main__":
    main()
