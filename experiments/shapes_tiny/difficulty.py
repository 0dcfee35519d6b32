"""How hard the built-in shapes are: baselines of raw pixels, and a network trained on the labels.

  PYTHONPATH=. python experiments/shapes_tiny/difficulty.py

Nothing is pre-trained here, so that the drawing can be judged before any recipe. The network is
the encoder of `configs/shapes_tiny.py` from a random start, trained by `evaluation.finetune`.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from hjepa_jax.config import build
from hjepa_jax.configs import shapes_tiny
from hjepa_jax.data.shapes import CLASS_NAMES, create_shapes
from hjepa_jax.evaluation.features import embed_pixels, extract_features
from hjepa_jax.evaluation.finetune import FinetuneSettings, finetune
from hjepa_jax.evaluation.knn import knn_probe
from hjepa_jax.evaluation.linear import linear_probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the drawing and the network")
    parser.add_argument("--num_epochs", type=float, default=8.0, help="of the supervised network")
    args = parser.parse_args()
    num_classes = len(CLASS_NAMES)
    began = time.perf_counter()
    train, test = create_shapes(seed=args.seed)
    print(f"drawing: {time.perf_counter() - began:.1f} s", flush=True)

    embed = jax.jit(embed_pixels)
    x, test_x = (
        extract_features(embed, None, split.images, batch_size=256)["pixels"]
        for split in (train, test)
    )
    arrays = (x, train.labels, test_x, test.labels)
    for k in (1, 20):
        found = knn_probe(*arrays, ks=[k], num_classes=num_classes)
        print(f"raw pixels, {k}-NN: {100 * found.top1:.1f} %", flush=True)
    found = linear_probe(*arrays, num_classes=num_classes, l2_grid=(1.0, 0.1, 0.01))
    print(f"raw pixels, linear: {100 * found.top1:.1f} %", flush=True)

    config = shapes_tiny.get_config().unlock()
    config.seed = args.seed
    model = build.build_model(config)
    images = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
    encoder = model.context_encoder
    params = encoder.init(jax.random.PRNGKey(args.seed), images)["params"]
    began = time.perf_counter()
    # Every layer at the same rate: nothing was learned before that has to be kept.
    settings = FinetuneSettings(
        num_classes,
        num_epochs=args.num_epochs,
        batch_size=64,
        learning_rate=2e-3,
        layer_decay=1.0,
        drop_path=0.0,
        label_smoothing=0.0,
        seed=args.seed,
    )
    scores, _ = finetune(
        encoder,
        params,
        train,
        test,
        settings,
        augment=build.build_augment(config),
        preprocess=build.build_preprocess(config),
    )
    took = time.perf_counter() - began
    print(
        f"trained on labels, {args.num_epochs:g} epochs: {100 * scores['top1']:.1f} % "
        f"({took:.0f} s, loss {scores['train_loss']:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
