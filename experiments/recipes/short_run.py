"""Trains a few hundred steps and probes on a part of the data: to compare recipes.

  python experiments/recipes/short_run.py --config=configs/cifar10_patches.py \
    --config.train.num_steps=250 [any other --config.* override]

Leaves nothing behind. Prints the probe table of the target encoder, the encoder at step 0 and raw
pixels, on the first `--num_train` training and `--num_test` test images: to be compared with
other tables of this script only.
"""

import pathlib
import tempfile

from absl import flags
from ml_collections import config_flags

from hjepa_jax import build, checkpoint, cli, run, train
from hjepa_jax.data.sources import Split
from hjepa_jax.evaluation.protocols import Protocol, evaluate_encoders
from hjepa_jax.evaluation.results import format_tables

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
_NUM_TRAIN = flags.DEFINE_integer("num_train", 8000, "Training images that the probes use.")
_NUM_TEST = flags.DEFINE_integer("num_test", 4000, "Test images that the probes use.")


def main():
    config = _CONFIG.value
    config.eval.probe_at_end = False
    config.log.tensorboard = False
    with tempfile.TemporaryDirectory() as workdir:
        train.train_and_evaluate(config, pathlib.Path(workdir))
        model, params = checkpoint.load_encoder(workdir)

    source = run.open_config_source(config)
    built = run.build_run(config, source)
    part = [
        Split(split.images[:size], split.labels[:size])
        for split, size in zip(source.load(), (_NUM_TRAIN.value, _NUM_TEST.value), strict=True)
    ]
    rows = evaluate_encoders(
        build.build_embed_fn(config, model),
        {"target": params, "random_init": built.create()[0].target_params},
        *part,
        num_classes=len(source.info.class_names),
        step=built.schedules.num_steps,
        protocol=Protocol(num_val=config.eval.num_val, batch_size=config.eval.batch_size),
    )
    print(format_tables(rows))


if __name__ == "__main__":
    cli.run(main)
