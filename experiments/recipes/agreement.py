"""Views that agree: patch prediction, batches, views and weights compared over two epochs.

ViT 128 x 4 on CIFAR-10, products in bfloat16; 15 minutes a row on one core. Each image has the
masked view, from which patches are predicted, and further crops. The encoder sees 16 of 64 patches
of each crop. The projected summary tokens of all views agree.

  hjepa sweep experiments/recipes/agreement.py --num_fit=12000
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_patches

SHARED = {
    "model.width": 128, "model.depth": 4, "model.num_heads": 4, "model.predictor_width": 64,
    "model.predictor_num_heads": 2, "model.dtype": "bfloat16", "train.num_epochs": 2.0,
    "train.batch_size": 128, "optim.learning_rate": 1e-3, "optim.warmup_epochs": 0.1,
    "data.local_views": 3, "data.local_size": 32, "data.local_patches": 16,
    "data.local_crop_scale": (0.3, 1.0), "data.brightness": 0.4, "data.contrast": 0.4,
    "data.saturation": 0.4, "data.grayscale": 0.2, "loss.agreement_weight": 2.0,
    "loss.spread_weight": 0.5, "loss.regularizer": "none", "loss.regularizer_weight": 0.0,
}  # fmt: skip
ROWS = {
    "base": {},
    "agreement_alone": {"loss.level_weights": (0.0, 0.0)},
    "levels_0.3": {"loss.level_weights": (0.3, 0.3)},
    "weights_twice": {"loss.agreement_weight": 4.0, "loss.spread_weight": 1.0},
    "weights_half": {"loss.agreement_weight": 1.0, "loss.spread_weight": 0.25},
    "spread_0.25": {"loss.spread_weight": 0.25},
    "batch_64": {"train.batch_size": 64},
    "batch_256": {"train.batch_size": 256},
    "views_7": {"data.local_views": 7},
    "patches_32": {"data.local_patches": 32},
    "crops_0.15": {"data.local_crop_scale": (0.15, 1.0)},
    "vicreg": {"loss.regularizer": "vicreg", "loss.regularizer_weight": 0.01},
}  # fmt: skip


def get_config() -> Config:
    """The config that all rows change."""
    c = cifar10_patches.get_config()
    c.update_from_flattened_dict(SHARED)
    return c
