"""Trains a few hundred steps and scores every representation quickly: to compare recipes.

  python experiments/recipes/short_run.py --config=configs/cifar10_tiny.py \
    --config.train.num_steps=250 [any other --config.* override]

Writes nothing. Prints scores of the encoder at step 0 and of the target encoder at the end: top-1
in percent of the linear / k-NN probe on the first `--num_train` training and `--num_test` test
images. On a part of the data, so to be compared with each other only.
"""

import time

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from hjepa_jax import build, metrics, run
from hjepa_jax.config import validate
from hjepa_jax.data.pipeline import BatchOrder
from hjepa_jax.evaluation.features import extract_features, representations
from hjepa_jax.evaluation.knn import knn_probe
from hjepa_jax.evaluation.linear import linear_probe
from hjepa_jax.evaluation.quality import effective_rank

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.")
_NUM_TRAIN = flags.DEFINE_integer("num_train", 8000, "Training images that the scores use.")
_NUM_TEST = flags.DEFINE_integer("num_test", 4000, "Test images that the scores use.")


def main(_):
    config = _CONFIG.value
    validate(config)
    source = run.open_config_source(config)
    built = run.build_run(config, source)
    train, test = source.load()
    state, window = built.create()
    embed = jax.jit(build.build_embed_fn(config, built.model))
    n, m = _NUM_TRAIN.value, _NUM_TEST.value
    num_classes = len(source.info.class_names)

    def score(name, params):
        train_x, test_x = (
            representations(extract_features(embed, params, images, batch_size=500))
            for images in (train.images[:n], test.images[:m])
        )
        scores = []
        for (pool, level, x), (_, _, y) in zip(train_x, test_x, strict=True):
            data = (x, train.labels[:n], y, test.labels[:m])
            linear = linear_probe(*data, num_classes=num_classes).top1
            knn = knn_probe(*data, num_classes=num_classes, ks=(20,)).top1
            scores.append(f"{pool}/{level} {100 * linear:.1f}/{100 * knn:.1f}")
        print(f"{name}: {'  '.join(scores)}  rank {effective_rank(train_x[0][2][:2000]):.1f}")

    score("step 0", state.target_params)
    step_fn = built.lower(steps_per_call=1, donate=True).compile()
    images = jax.device_put(train.images)
    batch_size, num_steps = config.train.batch_size, built.schedules.num_steps
    order = BatchOrder(len(train.images), batch_size, config.seed)
    started = time.perf_counter()
    for step in range(num_steps):
        index = jnp.asarray(order.batches(step, 1, size=1))
        state, window = step_fn(state, window, images, index, jnp.int32(1))
    values = metrics.summarize(window, step=num_steps, batch_size=batch_size)
    rate = num_steps * batch_size / (time.perf_counter() - started)
    print(f"mean loss {values['loss']:.3f}, {rate:.0f} images/s")
    score(f"step {num_steps}", state.target_params)


if __name__ == "__main__":
    app.run(main)
