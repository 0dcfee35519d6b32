"""ViT-Tiny with four blocks on CIFAR-10 at its native 32x32, patch 4: the config to begin with.

  python -m hjepa_jax.main --config=configs/cifar10_tiny.py

The loss predicts hidden patches as in `cifar10_patches`, and compares three views of an image: the
masked view, one further crop, and the EMA encoder's view of the whole image. The encoder sees a
quarter of the patches of the crop.

The work per image (0.86 GFLOP) is chosen such that 20 epochs on two CPU cores take an evening:
2.7 hours in experiments/cifar10_tiny.
experiments/recipes says which parts were compared, and which were chosen for their cost. For
ViT-Tiny's twelve blocks and nine views: --config.model.depth=12 --config.data.local_views=7.
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_patches


def get_config() -> Config:
    c = cifar10_patches.get_config().unlock()
    c.data.crop_scale = (0.45, 1.0)
    c.data.local_views = 1
    c.data.local_size = None  # the size of the image
    c.data.local_patches = 0.25
    c.data.local_crop_scale = (0.2, 1.0)
    c.data.brightness = c.data.contrast = c.data.saturation = 0.4
    c.data.hue = 0.1
    c.data.jitter_probability = 0.8
    c.data.grayscale = 0.2

    c.model.depth = 4
    c.model.stem = "hmlp"
    c.model.predictor_depth = 1

    c.loss.summary_weight = 0.0
    c.loss.agreement_weight = 2.0
    c.loss.teacher_weight = 1.0
    c.loss.spread_weight = 0.5
    c.loss.spread_moment = "views"
    c.loss.regularizer = "none"
    c.loss.regularizer_weight = 0.0

    c.optim.kind = "muon"
    c.optim.learning_rate = 3e-3
    c.train.batch_size = 256
    c.eval.every_epochs = 2.0
    return c.lock()
