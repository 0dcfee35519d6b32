"""Ten epochs of a small encoder on CIFAR-10: what keeps features improving after the fifth?

ViT 128 x 4 in batches of 256, products in bfloat16, k-NN after each epoch; 40 minutes a row on one
core.
"""

CONFIG = "cifar10_tiny"
SHARED = {
    "model.width": 128, "model.depth": 4, "model.num_heads": 4, "model.predictor_width": 64,
    "model.predictor_num_heads": 2, "model.dtype": "bfloat16", "train.batch_size": 256,
    "train.num_epochs": 10.0, "optim.learning_rate": 1e-3, "eval.every_epochs": 1.0,
}  # fmt: skip
SEEDS = (0,)
NUM_FIT = 12_000
CROSS_VIEW = {
    "data.brightness": 0.4, "data.contrast": 0.4, "data.saturation": 0.4, "data.grayscale": 0.2,
    "data.crop_scale": (0.3, 1.0), "model.global_level": True, "loss.cross_view": 1.0,
    "model.global_target": "summary",
}  # fmt: skip
ROWS = {
    "base": {},
    "ema_to_1": {"optim.ema_momentum": (0.98, 1.0, "cosine")},
    "constant_rate": {"optim.final_learning_rate": 1e-3},
    "constant_rate_ema_to_1": {
        "optim.final_learning_rate": 1e-3, "optim.ema_momentum": (0.98, 1.0, "cosine"),
    },
    "target_layers_4": {"model.target_layers": 4},
    "cross_view_light": {**CROSS_VIEW, "loss.level_weights": (0.25, 0.25)},
}  # fmt: skip
