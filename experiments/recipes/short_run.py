"""Trains a few hundred steps and probes on a part of the training images: to compare recipes.

  PYTHONPATH=. python experiments/recipes/short_run.py --config=configs/cifar10_patches.py \
    --config.train.num_steps=250 [any other --config.* override]

Leaves nothing behind. Prints the table of `experiments/held_out.py`: to be compared with other
tables of as many images only.
"""

import pathlib
import tempfile

from absl import flags
from ml_collections import config_flags

from experiments.held_out import held_out_rows
from hjepa_jax import cli
from hjepa_jax.evaluation.results import format_tables
from hjepa_jax.training import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
_NUM_FIT = flags.DEFINE_integer("num_fit", 8000, "Training images that the probes fit.")


def main():
    config = _CONFIG.value
    config.eval.probe_at_end = False
    config.log.tensorboard = False
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        train.train_and_evaluate(config, workdir)
        print(format_tables(held_out_rows(workdir, _NUM_FIT.value)))


if __name__ == "__main__":
    cli.run(main)
