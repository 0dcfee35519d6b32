"""Which recipe for ViT-Tiny? Runs long enough to tell, for a GPU.

Masks, targets of a second view, local views, what keeps features apart, and the masks, optimizer
and encoder of the best open code of this size (`open_*`: half of the grid seen, a quarter predicted
in scattered 2x2 cells by cross-attention; LayerScale, registers, flips both ways).
"""

CONFIG = "cifar10_patches"
SHARED = {
    "model.dtype": "bfloat16", "train.num_epochs": 10.0, "train.batch_size": 256,
    "optim.learning_rate": 1e-3, "train.steps_per_call": 65, "log.every_steps": 195,
    "train.checkpoint_every_epochs": 100.0,
}  # fmt: skip
SEEDS = (0,)
STRONGER = {
    "data.brightness": 0.4, "data.contrast": 0.4, "data.saturation": 0.4, "data.grayscale": 0.2,
    "data.crop_scale": (0.3, 1.0),
}  # fmt: skip
CROSS_VIEW = {
    "model.global_level": True, "loss.cross_view": 1.0, "model.global_target": "summary", **STRONGER
}  # fmt: skip
OPEN = {
    "mask.kind": "random", "mask.align_level": 1, "mask.scale": (0.25, 0.25),
    "mask.num_context": 32, "model.predictor_mode": "cross", "model.predictor_depth": 4,
    "model.num_registers": 4, "data.vertical_flip": 0.5, "optim.weight_decay": 0.2,
    "optim.b1": 0.85,
}  # fmt: skip
SIGREG = {"loss.regularizer": "sigreg", "loss.regularizer_weight": 0.02}
BATCH_64 = {"train.batch_size": 64, "train.steps_per_call": 78, "log.every_steps": 780}
LOCAL = {**CROSS_VIEW, "data.local_views": 4}
LIGHT = {**LOCAL, "loss.level_weights": (0.25, 0.25)}
ROWS = {
    "baseline": {},
    "batch_64": {**BATCH_64, "optim.learning_rate": 3e-4},
    "masks_4": {"mask.num_masks": 4},
    "masks_4_batch_64": {**BATCH_64, "mask.num_masks": 4, "optim.learning_rate": 6e-4},
    "open": OPEN,
    "open_layer_scale": {**OPEN, "model.layer_scale": 1e-5, "optim.learning_rate": 2e-3},
    "open_sigreg": {**OPEN, **SIGREG},
    "open_masks_4": {**OPEN, "mask.num_masks": 4},
    "cross_view": CROSS_VIEW,
    "local_views": LOCAL,
    "local_views_light": LIGHT,
    "local_views_sigreg": {**LIGHT, **SIGREG},
    "local_views_ema": {**LIGHT, "optim.ema_momentum": (0.99, 1.0, "cosine")},
    "local_views_patches": {**LOCAL, "model.global_target": "patches", "loss.cross_view": 0.5},
    "local_views_8_open": {**OPEN, **LOCAL, "data.local_views": 8},
}  # fmt: skip
