"""A small ViT on procedural shapes: no download, minutes on two CPU cores.

python -m hjepa_jax.main --config=configs/shapes_tiny.py
"""

from hjepa_jax.config import Config, base_config


def get_config() -> Config:
    c = base_config()
    c.data.source = "shapes"
    c.data.mean = (0.5, 0.5, 0.5)
    c.data.std = (0.25, 0.25, 0.25)

    c.model.width = 128
    c.model.depth = 4
    c.model.num_heads = 4
    c.model.predictor_width = 64
    c.model.predictor_depth = 2
    c.model.predictor_num_heads = 2

    c.optim.learning_rate = 2e-3
    c.optim.warmup_epochs = 0.3
    c.train.batch_size = 128
    c.train.num_epochs = 2.0
    c.eval.knn_bank_size = 5_000
    return c.lock()
