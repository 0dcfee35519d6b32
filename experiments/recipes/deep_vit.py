"""Recipes on CIFAR-10 with an encoder as deep as ViT-Tiny, two epochs.

ViT 128 x 12, products in bfloat16; 15 to 20 minutes a row on one core of a Xeon with AMX.

  hjepa sweep experiments/recipes/deep_vit.py --num_fit=20000
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_patches

SHARED = {
    "model.width": 128, "model.depth": 12, "model.num_heads": 4, "model.predictor_width": 64,
    "model.predictor_num_heads": 2, "model.dtype": "bfloat16", "train.num_epochs": 2.0,
    "optim.warmup_epochs": 0.1, "eval.num_val": 10_000,
    # The values of the config at that time.
    "model.positions": "sincos2d", "optim.learning_rate": 1e-3,
}  # fmt: skip
ROWS = {
    "random_init": {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.num_steps": 1},
    "base": {},
    "learning_rate_3e-4": {"optim.learning_rate": 3e-4},
    "rate_and_summary": {"optim.learning_rate": 3e-4, "loss.summary_weight": 0.25},
    "rate_and_rope": {"optim.learning_rate": 3e-4, "model.positions": "rope2d"},
    "rate_and_rope_layer_scale": {
        "optim.learning_rate": 3e-4, "model.positions": "rope2d", "model.layer_scale": 0.1,
    },
    "rope_random_init": {
        "model.positions": "rope2d",
        "optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.num_steps": 1,
    },
    "predictor_depth_4": {"model.predictor_depth": 4},
    "summary_weight_0.25": {"loss.summary_weight": 0.25},
    "plain_pixels": {
        "data.brightness": 0.0, "data.contrast": 0.0, "data.saturation": 0.0,
        "data.crop_scale": (1.0, 1.0), "data.crop_ratio": (1.0, 1.0),
    },
}  # fmt: skip


def get_config() -> Config:
    """The config that all rows change."""
    c = cifar10_patches.get_config()
    c.update_from_flattened_dict(SHARED)
    return c
