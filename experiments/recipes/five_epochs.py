"""Five epochs of a small encoder on CIFAR-10 at a rate that is kept: what else holds k-NN back?

ViT 128 x 4 in batches of 256, products in bfloat16, k-NN after each epoch; 20 minutes a row on one
core, `masks_4` 50.
"""

CONFIG = "cifar10_tiny"
SHARED = {
    "model.width": 128, "model.depth": 4, "model.num_heads": 4, "model.predictor_width": 64,
    "model.predictor_num_heads": 2, "model.dtype": "bfloat16", "train.batch_size": 256,
    "train.num_epochs": 5.0, "optim.learning_rate": 1e-3, "optim.final_learning_rate": 1e-3,
    "eval.every_epochs": 1.0,
}  # fmt: skip
SEEDS = (0,)
NUM_FIT = 12_000
ROWS = {
    "base": {},
    "masks_4": {"mask.num_masks": 4},
    "vicreg_strong": {"loss.regularizer_weight": 0.05},
    "twice_the_rate": {"optim.learning_rate": 2e-3, "optim.final_learning_rate": 2e-3},
    "light_levels": {"loss.level_weights": (0.25, 0.25)},
    "batch_128": {"train.batch_size": 128},
    "crops_from_0.3": {"data.crop_scale": (0.3, 1.0)},
    "positions_sincos2d": {"model.positions": "sincos2d"},
    "context_of_8": {"mask.num_context": 8},
    "hierarchical": {"mask.kind": "hierarchical", "mask.num_blocks": 3},
}  # fmt: skip
