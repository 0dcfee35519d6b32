"""Ten epochs of a small encoder on CIFAR-10: do features still improve after the fifth?

ViT 128 x 4 in batches of 256, products in bfloat16, k-NN after each epoch; 40 minutes a row on one
core.

  hjepa sweep experiments/recipes/ten_epochs.py --num_fit=12000
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_patches

SHARED = {
    "model.width": 128, "model.depth": 4, "model.num_heads": 4, "model.predictor_width": 64,
    "model.predictor_num_heads": 2, "model.dtype": "bfloat16", "train.batch_size": 256,
    "train.num_epochs": 10.0, "optim.learning_rate": 1e-3, "eval.every_epochs": 1.0,
}  # fmt: skip
KEPT = {"optim.final_learning_rate": 1e-3}
ROWS = {
    "base": {},
    "ema_to_1": {"optim.ema_momentum": (0.98, 1.0, "cosine")},
    "constant_rate": KEPT,
    "constant_rate_ema_to_1": {**KEPT, "optim.ema_momentum": (0.98, 1.0, "cosine")},
    "constant_rate_ema_0.996": {**KEPT, "optim.ema_momentum": (0.996, 0.996, "constant")},
    "constant_rate_vicreg_strong": {**KEPT, "loss.regularizer_weight": 0.05},
    "constant_rate_larger_blocks": {**KEPT, "mask.scale": (0.2, 0.35), "mask.num_blocks": 2},
    "constant_rate_context_block": {**KEPT, "mask.context_scale": (0.4, 0.6)},
}  # fmt: skip


def get_config() -> Config:
    """The config that all rows change."""
    c = cifar10_patches.get_config()
    c.update_from_flattened_dict(SHARED)
    return c
