"""ViT-Small on your own images at 96x96, patch 8, with the recipe of cifar10_small.

  python -m hjepa_jax.main --config=configs/photos_96.py --config.data.source=folder:photos

For photos with one subject and few details. There are 144 patches, and the encoder sees 36 of each
view. Most sizes follow `data.image_size`, which may also be (height, width). Parts of the recipe
were compared on CIFAR-10 (experiments/recipes). No run on photos has been made yet.
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_small


def get_config() -> Config:
    c = cifar10_small.get_config().unlock()
    c.data.source = "folder:photos"
    c.data.image_size = 96
    c.data.mean = (0.485, 0.456, 0.406)  # of ImageNet
    c.data.std = (0.229, 0.224, 0.225)
    c.model.patch_size = 8
    c.optim.warmup_epochs = 5.0
    c.train.batch_size = 128  # own image sets are often small: more updates per epoch
    return c.lock()
