"""ViT-Tiny on CIFAR-10 at its native 32x32, patch 4: the config to begin with.

  python -m hjepa_jax.main --config=configs/cifar10_tiny.py

The loss predicts hidden patches as in `cifar10_patches`, and compares the views of an image: the
masked view and seven further crops. The encoder sees a quarter of the patches of each crop. Views
and colours come from an earlier recipe that was scored on held-out training images. Optimizer and
learning rate come from runs of two epochs with half as many blocks (experiments/recipes). Batch
size and loss weights were not compared.

The longest run with AdamW had fifteen epochs (experiments/cifar10_tiny_agreement). The longest run
with Muon had four epochs, three further views and VICReg (experiments/cifar10_tiny_muon).
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_patches


def get_config() -> Config:
    c = cifar10_patches.get_config().unlock()
    c.data.local_views = 7
    c.data.local_size = None  # the size of the image
    c.data.local_patches = 0.25
    c.data.local_crop_scale = (0.3, 1.0)
    c.data.brightness = c.data.contrast = c.data.saturation = 0.4
    c.data.grayscale = 0.2

    c.loss.agreement_weight = 2.0
    c.loss.spread_weight = 0.5
    c.loss.regularizer = "none"
    c.loss.regularizer_weight = 0.0

    c.optim.kind = "muon"
    c.optim.learning_rate = 3e-3
    c.train.batch_size = 128
    return c.lock()
