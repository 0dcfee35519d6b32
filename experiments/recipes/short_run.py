"""Trains a few hundred steps and scores every representation quickly: to compare recipes.

  python experiments/recipes/short_run.py --config=configs/cifar10_tiny.py \
    --config.train.num_steps=250 [any other --config.* override]

Writes nothing. Prints scores of the encoder at step 0 and of the target encoder at the end: ridge
regression / 20-nearest-neighbour top-1 in percent, on the first `--num_train` training and
`--num_test` test images. These numbers rank recipes; they are not the probes of the protocol.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from hjepa_jax import build, metrics, run
from hjepa_jax.config import validate
from hjepa_jax.data.pipeline import BatchOrder
from hjepa_jax.evaluation.features import extract_features, representations
from hjepa_jax.evaluation.knn import knn_predict
from hjepa_jax.evaluation.quality import effective_rank

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.")
_NUM_TRAIN = flags.DEFINE_integer("num_train", 8000, "Training images that the scores use.")
_NUM_TEST = flags.DEFINE_integer("num_test", 4000, "Test images that the scores use.")
RIDGE_GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def ridge_top1(train_x, train_y, test_x, test_y):
    """Top-1 of ridge regression on one-hot labels; penalty chosen on the last fifth of train."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    x, z = (np.c_[(a - mean) / std, np.ones(len(a))] for a in (train_x, test_x))
    onehot = np.eye(train_y.max() + 1)[train_y]

    def top1(l2, a, b, query, labels):
        gram = a.T @ a + l2 * len(a) * np.eye(a.shape[1])
        return ((query @ np.linalg.solve(gram, a.T @ b)).argmax(1) == labels).mean()

    n = len(x) * 4 // 5
    best = max(RIDGE_GRID, key=lambda l2: top1(l2, x[:n], onehot[:n], x[n:], train_y[n:]))
    return top1(best, x, onehot, z, test_y)


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
            ridge = ridge_top1(x, train.labels[:n], y, test.labels[:m])
            (nearest,) = knn_predict(x, train.labels[:n], y, ks=(20,), num_classes=num_classes)
            knn = (nearest == test.labels[:m]).mean()
            scores.append(f"{pool}/{level} {100 * ridge:.1f}/{100 * knn:.1f}")
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
