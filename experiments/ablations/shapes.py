"""Options that change the learned features, one at a time, on shapes_tiny.

One epoch (312 steps of 64) in bfloat16 on one core: two and a half minutes a row. shapes.csv also
has rows of options that are gone; their commits made them.

  hjepa sweep experiments/ablations/shapes.py --seeds=0,1,2 --num_fit=12000
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import shapes_tiny

SHARED = {"model.dtype": "bfloat16", "train.num_epochs": 1.0, "parallel.cpu_devices": 1}
LEVELS_1 = {"model.num_levels": 1, "loss.level_weights": (0.5,)}
LEVELS_3 = {"model.num_levels": 3, "loss.level_weights": (0.5, 0.5, 0.5)}
I_JEPA = {**LEVELS_1, "loss.summary_weight": 0.0, "loss.regularizer": "none"}
HALF = {"train.num_epochs": 0.5, "model.positions": "rope2d"}
FINE = {
    **LEVELS_3, "model.patch_size": 2, "mask.num_context": 64, "mask.min_coverage": 0.5,
    "mask.kind": "hierarchical", "mask.scale": (0.05, 0.1), "mask.num_blocks": 3,
}  # fmt: skip
ROWS = {
    "baseline": {},
    "random_init": {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.num_steps": 1},
    "mask_whole_cells": {"mask.align_level": 1, "mask.scale": (0.18, 0.25)},
    "mask_hierarchical": {"mask.kind": "hierarchical", "mask.progression": ("geometric", 1.5)},
    "mask_hierarchical_larger": {"mask.kind": "hierarchical", "mask.progression": ("linear", 2.0)},
    "mask_random_half": {"mask.kind": "random", "mask.scale": (0.5, 0.6)},
    "mask_random_cells": {
        "mask.kind": "random", "mask.scale": (0.5, 0.6), "mask.align_level": 1,
    },
    "levels_1": LEVELS_1,
    "levels_3_whole_cells": LEVELS_3,
    # Hardly one of the four cells of level 2 is hidden as a whole. If half of it is enough, there
    # are targets. Three levels compare with `half_covered`.
    "half_covered": {"mask.min_coverage": 0.5},
    "levels_3": {**LEVELS_3, "mask.min_coverage": 0.5},
    # The level weights have the same sum as in the baseline, beside the same regularizer.
    "levels_1_same_sum": {"model.num_levels": 1, "loss.level_weights": (2.0,)},
    "levels_3_same_sum": {
        "model.num_levels": 3, "mask.min_coverage": 0.5, "loss.level_weights": (0.67, 0.67, 0.67),
    },
    "summary_tokens_1": {"model.num_summary_tokens": 1},
    "no_summary_pass": {"loss.summary_weight": 0.0},
    "positions_learned": {"model.positions": "learned"},
    "positions_rope2d": {"model.positions": "rope2d"},
    "registers_4": {"model.num_registers": 4},
    "layer_scale": {"model.layer_scale": 0.1},
    "drop_path": {"model.drop_path": 0.1},
    "predictor_blocks": {"model.predictor_mode": "blocks"},
    "predictor_width_96": {"model.predictor_width": 96, "model.predictor_num_heads": 3},
    "predictor_cross": {"model.predictor_mode": "cross"},
    "pyramid_add": {"model.pyramid": "add"},
    "pyramid_add_whole_cells": {
        "model.pyramid": "add", "mask.align_level": 1, "mask.scale": (0.18, 0.25),
    },
    "pyramid_concat": {"model.pyramid": "concat"},
    "no_regularizer": {"loss.regularizer": "none"},
    "vicreg_on_context": {"loss.regularized": "context"},
    "vicreg_on_both": {"loss.regularized": "both"},
    "vicreg_strong": {"loss.regularizer_weight": 0.05},
    "sigreg": {"loss.regularizer": "sigreg", "loss.regularizer_weight": 0.02},
    "sigreg_strong": {"loss.regularizer": "sigreg", "loss.regularizer_weight": 0.1},
    "sigreg_stronger": {"loss.regularizer": "sigreg", "loss.regularizer_weight": 0.5},
    "sigreg_weak": {"loss.regularizer": "sigreg", "loss.regularizer_weight": 0.002},
    "sigreg_both": {
        "loss.regularizer": "sigreg", "loss.regularizer_weight": 0.02, "loss.regularized": "both",
    },
    "sigreg_online": {
        "loss.regularizer": "sigreg", "loss.regularizer_weight": 0.02, "model.target": "online",
        "loss.regularized": "both",
    },
    "loss_mse": {"loss.kind": "mse"},
    "loss_cosine": {"loss.kind": "cosine"},
    "ema_to_1_linear": {"optim.ema_momentum": (0.98, 1.0, "linear")},
    "ema_to_1": {"optim.ema_momentum": (0.98, 1.0, "cosine")},
    "vertical_flip": {"data.vertical_flip": 0.5},
    "blur": {"data.blur": 0.5, "data.blur_sigma": (0.1, 1.0)},
    "solarize": {"data.solarize": 0.2},
    "grayscale": {"data.grayscale": 0.2},
    "float32": {"model.dtype": "float32"},
    # The progressions differ from three levels on, which need a grid of 16 x 16 patches.
    "levels_3_fine_geometric": {**FINE, "mask.progression": ("geometric", 2.0)},
    "levels_3_fine_linear": {**FINE, "mask.progression": ("linear", 2.0)},
    "remat": {"model.remat": True},
    # I-JEPA's objective, but for its distance and EMA schedule.
    "i_jepa": I_JEPA,
    # Half an epoch, and another half that starts from it, at the same or a lower resolution.
    "half_32": HALF,
    "half_24": {**HALF, "data.image_size": 24},
    "half_32_from_32": {**HALF, "train.init_from": "half_32"},
    "half_32_from_24": {**HALF, "train.init_from": "half_24"},
}  # fmt: skip


def get_config() -> Config:
    """The config that all rows change."""
    c = shapes_tiny.get_config()
    c.update_from_flattened_dict(SHARED)
    return c
