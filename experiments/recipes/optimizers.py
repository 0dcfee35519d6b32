"""AdamW and Muon, and VICReg on the summary tokens beside Muon; two epochs.

ViT 192 x 6 on CIFAR-10, products in bfloat16, three further views; 35 minutes a row on one core.

  hjepa sweep experiments/recipes/optimizers.py --num_fit=12000
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_tiny

SHARED = {
    "model.depth": 6, "model.stem": "linear", "model.predictor_depth": 2,
    "model.dtype": "bfloat16", "data.crop_scale": (0.6, 1.0),
    "data.local_crop_scale": (0.3, 1.0), "data.hue": 0.0, "data.jitter_probability": 1.0,
    "data.local_views": 3, "loss.summary_weight": 1.0,
    "loss.teacher_weight": 0.0, "loss.spread_moment": "batch", "loss.regularizer": "none",
    "loss.regularizer_weight": 0.0, "train.batch_size": 128, "train.num_epochs": 2.0,
    "optim.warmup_epochs": 0.2,
}  # fmt: skip


def _row(kind, rate, vicreg=None):
    row = {"optim.kind": kind, "optim.learning_rate": rate}
    if vicreg is None:
        return row
    return {**row, "loss.regularizer": "vicreg", "loss.regularizer_weight": vicreg}


ROWS = {
    "adamw_7e-4": _row("adamw", 7e-4),
    "adamw_2e-3": _row("adamw", 2e-3),
    "muon_1e-3": _row("muon", 1e-3),
    "muon_3e-3": _row("muon", 3e-3),
    "muon_6e-3": _row("muon", 6e-3),
    "muon_vicreg_0.02": _row("muon", 3e-3, vicreg=0.02),
    "muon_vicreg_0.1": _row("muon", 3e-3, vicreg=0.1),
}


def get_config() -> Config:
    """The config that all rows change."""
    c = cifar10_tiny.get_config()
    c.update_from_flattened_dict(SHARED)
    return c
