"""A small ViT on procedural shapes: no download, minutes on two CPU cores.

python -m hjepa_jax.main --config=configs/shapes_tiny.py
"""

from hjepa_jax.config import Config, base_config


def get_config() -> Config:
    c = base_config()
    c.data.source = "shapes"
    c.data.mean = (0.5, 0.5, 0.5)
    c.data.std = (0.25, 0.25, 0.25)

    c.model.width = 96
    c.model.depth = 4
    c.model.num_heads = 3
    c.model.positions = "sincos2d"
    c.model.predictor_width = 64
    c.model.predictor_depth = 1
    c.model.predictor_num_heads = 2

    c.mask.align_level = 0
    c.mask.scale = (0.09, 0.19)  # 3x2, 3x3, 3x4 or 4x3 of the 8x8 patches
    c.loss.regularizer_weight = 0.01

    c.optim.learning_rate = 2e-3
    c.optim.warmup_epochs = 0.2
    c.train.batch_size = 64
    c.train.num_epochs = 3.0
    c.eval.every_epochs = 1.5
    c.eval.knn_bank_size = 2_000
    c.parallel.cpu_devices = 2
    return c.lock()
