"""The options that matter most, on CIFAR-10: masks, levels, summary pass, regularizer.

The encoder is smaller than in the config, for one epoch: rows compare with each other only.

  hjepa sweep experiments/ablations/cifar10.py --seeds=0,1,2 --num_fit=12000
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_patches

SHARED = {
    "model.width": 128, "model.depth": 4, "model.num_heads": 4, "model.predictor_width": 64,
    "model.predictor_num_heads": 2, "model.dtype": "bfloat16", "train.num_epochs": 1.0,
    "optim.warmup_epochs": 0.1, "optim.learning_rate": 1e-3,
}  # fmt: skip
STRONGER = {
    "data.brightness": 0.4, "data.contrast": 0.4, "data.saturation": 0.4, "data.grayscale": 0.2,
    "data.crop_scale": (0.4, 1.0),
}  # fmt: skip
ROWS = {
    "baseline": {},
    "random_init": {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.num_steps": 1},
    "mask_whole_cells": {"mask.align_level": 1, "mask.scale": (0.18, 0.25)},
    "mask_hierarchical": {"mask.kind": "hierarchical", "mask.progression": ("geometric", 1.5)},
    "mask_random": {"mask.kind": "random", "mask.scale": (0.5, 0.6)},
    "levels_1": {"model.num_levels": 1},
    # Hardly one of the four cells of level 2 is hidden as a whole. If half of it is enough, there
    # are targets. Three levels compare with `half_covered`.
    "half_covered": {"mask.min_coverage": 0.5},
    "levels_3": {"model.num_levels": 3, "mask.min_coverage": 0.5},
    # The level weights have the same sum as in the baseline, beside the same regularizer.
    "levels_1_same_sum": {"model.num_levels": 1, "loss.level_weights": (2.0,)},
    "levels_3_same_sum": {
        "model.num_levels": 3, "mask.min_coverage": 0.5, "loss.level_weights": (0.67, 0.67, 0.67),
    },
    "no_summary_pass": {"loss.summary_weight": 0.0},
    "sigreg": {"loss.regularizer": "sigreg", "loss.regularizer_weight": 0.02},
    "no_regularizer": {"loss.regularizer": "none"},
    "sigreg_both": {
        "loss.regularizer": "sigreg", "loss.regularizer_weight": 0.02, "loss.regularized": "both",
    },
    "sigreg_both_online": {
        "loss.regularizer": "sigreg", "loss.regularizer_weight": 0.02, "loss.regularized": "both",
        "model.target": "online",
    },
    "layer_scale": {"model.layer_scale": 0.1},
    "positions_sincos2d": {"model.positions": "sincos2d"},
    "stronger_augmentation": STRONGER,
}  # fmt: skip


def get_config() -> Config:
    """The config that all rows change."""
    c = cifar10_patches.get_config()
    c.update_from_flattened_dict(SHARED)
    return c
