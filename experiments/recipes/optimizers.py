"""AdamW and Muon, and what keeps the summary tokens apart under Muon; two epochs.

ViT 192 x 6 on CIFAR-10, products in bfloat16, three further views instead of seven; 35 minutes a
row on one core.
"""

CONFIG = "cifar10_tiny"
SHARED = {
    "model.depth": 6, "model.dtype": "bfloat16", "train.num_epochs": 2.0,
    "optim.warmup_epochs": 0.2, "data.local_views": 3,
}  # fmt: skip
SEEDS = (0,)
NUM_FIT = 12_000
MUON = {"optim.kind": "muon", "optim.learning_rate": 3e-3}
ROWS = {
    "adamw_7e-4": {},
    "adamw_2e-3": {"optim.learning_rate": 2e-3},
    "muon_1e-3": {**MUON, "optim.learning_rate": 1e-3},
    "muon_3e-3": MUON,
    "muon_6e-3": {**MUON, "optim.learning_rate": 6e-3},
    "muon_vicreg_0.1": {**MUON, "loss.regularizer": "vicreg", "loss.regularizer_weight": 0.1},
    "muon_vicreg_0.02": {**MUON, "loss.regularizer": "vicreg", "loss.regularizer_weight": 0.02},
}
