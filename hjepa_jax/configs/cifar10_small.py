"""ViT-Small on CIFAR-10 at its native 32x32, patch 4: the losses of cifar10_tiny, for a GPU.

  python -m hjepa_jax.main --config=configs/cifar10_small.py

All twelve blocks, nine views of an image instead of three, and 100 epochs. The longest run so far
had one and a half epochs of an earlier recipe (experiments/cifar10_small).
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_tiny


def get_config() -> Config:
    c = cifar10_tiny.get_config().unlock()
    c.data.local_views = 7
    c.model.name = "vit_small"
    c.model.depth = None  # that of vit_small, 12
    c.model.predictor_width = 192
    c.model.predictor_num_heads = 3
    c.train.num_epochs = 100.0
    c.eval.every_epochs = 5.0
    return c.lock()
