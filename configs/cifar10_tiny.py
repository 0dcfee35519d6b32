"""ViT-Tiny on CIFAR-10 at its native 32x32, patch 4: the documented entry.

  python -m hjepa_jax.main --config=configs/cifar10_tiny.py

Hidden patches are predicted, with the masks of `cifar10_patches`, and the views of an image agree:
the masked view and seven further crops. The encoder sees a quarter of each crop.

Views and colours follow an earlier recipe that was scored on held-out training images. Optimizer
and rate were chosen in two epochs with half as deep an encoder (experiments/recipes). Batch size
and loss weights were not compared. The longest run so far (experiments/cifar10_tiny_agreement) used
AdamW at 7e-4. The longest run with Muon (experiments/cifar10_tiny_muon) has four epochs, three
further views and VICReg.
"""

from configs import cifar10_patches
from hjepa_jax.config import Config


def get_config() -> Config:
    c = cifar10_patches.get_config().unlock()
    c.data.local_views = 7
    c.data.local_size = 32
    c.data.local_patches = 16  # of 64
    c.data.local_crop_scale = (0.3, 1.0)
    c.data.brightness = c.data.contrast = c.data.saturation = 0.4
    c.data.grayscale = 0.2

    c.loss.agreement_weight = 2.0
    c.loss.spread_weight = 0.5
    c.loss.regularizer = "none"  # of the summary tokens themselves
    c.loss.regularizer_weight = 0.0

    c.optim.kind = "muon"
    c.optim.learning_rate = 3e-3
    c.train.batch_size = 128
    return c.lock()
