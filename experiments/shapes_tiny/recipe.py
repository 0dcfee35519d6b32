"""The recipe of the demo: variants of `configs/shapes_tiny.py` at the same number of images.

  PYTHONPATH=. python experiments/sweep.py experiments/shapes_tiny/recipe.py

Scored on held-out training images; the test images decide nothing.
"""

CONFIG = "shapes_tiny"
SHARED = {
    "model.width": 64, "model.depth": 3, "model.num_heads": 2, "model.predictor_width": 32,
    "model.predictor_num_heads": 1, "train.batch_size": 64, "train.num_epochs": 4.0,
    "optim.warmup_epochs": 0.2, "data.local_views": 3, "data.local_crop_scale": (0.4, 1.0),
    "optim.learning_rate": 3e-3, "loss.agreement_weight": 2.0, "loss.spread_weight": 0.5,
}  # fmt: skip
SEEDS = (0,)
NUM_FIT = 5_000
ROWS = {
    "random_init": {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.num_steps": 1},
    "base": {},
    "batch_128": {"train.batch_size": 128},
    "rate_6e-3": {"optim.learning_rate": 6e-3},
    "weights_twice": {"loss.agreement_weight": 4.0, "loss.spread_weight": 1.0},
    "two_views": {"data.local_views": 2},
}  # fmt: skip
