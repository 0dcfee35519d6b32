"""Recipes on CIFAR-10 with a small encoder, two epochs: optimization and masks.

ViT 128 x 4, products in bfloat16; ten minutes a row on one core of a Xeon with AMX.

  hjepa sweep experiments/recipes/small_vit.py --num_fit=12000
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_patches

SHARED = {
    "model.width": 128, "model.depth": 4, "model.num_heads": 4, "model.predictor_width": 64,
    "model.predictor_num_heads": 2, "model.dtype": "bfloat16", "train.num_epochs": 2.0,
    "optim.warmup_epochs": 0.1,
    # The values of the config at that time.
    "model.positions": "sincos2d", "optim.learning_rate": 1e-3,
}  # fmt: skip
ROWS = {
    "random_init": {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.num_steps": 1},
    "base": {},
    "ema_0.995": {"optim.ema_momentum": (0.995, 0.995, "constant")},
    "ema_0.99_to_1": {"optim.ema_momentum": (0.99, 1.0, "cosine")},
    "learning_rate_2e-3": {"optim.learning_rate": 2e-3},
    "learning_rate_5e-4": {"optim.learning_rate": 5e-4},
    "weight_decay_0.2": {"optim.weight_decay": 0.2, "optim.b1": 0.85},
    "mask_whole_cells": {"mask.align_level": 1, "mask.scale": (0.18, 0.25)},
    "mask_larger": {"mask.scale": (0.18, 0.3)},
    "mask_hierarchical": {"mask.kind": "hierarchical", "mask.progression": ("geometric", 1.5)},
    # A quarter of the grid is predicted, in scattered 2x2 cells; half of the grid is visible.
    "mask_random_cells": {
        "mask.kind": "random", "mask.align_level": 1, "mask.scale": (0.25, 0.25),
        "mask.num_context": 32,
    },
    "mask_random_cells_cross": {
        "mask.kind": "random", "mask.align_level": 1, "mask.scale": (0.25, 0.25),
        "mask.num_context": 32, "model.predictor_mode": "cross", "model.num_registers": 4,
        "model.positions": "rope2d",
    },
    "context_8": {"mask.num_context": 8},
    "no_summary_pass": {"loss.summary_weight": 0.0},
}  # fmt: skip


def get_config() -> Config:
    """The config that all rows change."""
    c = cifar10_patches.get_config()
    c.update_from_flattened_dict(SHARED)
    return c
