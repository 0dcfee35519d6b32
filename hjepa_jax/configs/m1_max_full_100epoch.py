"""The reference system's 100-epoch plan: ViT-Small/16 at 224, three levels, batch 24.

python -m hjepa_jax.main --config=configs/m1_max_full_100epoch.py
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import m1_max_full_20epoch


def get_config() -> Config:
    c = m1_max_full_20epoch.get_config().unlock()
    c.model.name = "vit_small"
    c.model.num_levels = 3
    c.model.predictor_num_heads = 6
    # Scattered cells of 2x2 patches cover the 14x14 grid evenly at all three levels. Blocks of
    # whole level-2 cells (4x4 patches) would have only one shape and nine positions.
    c.mask.kind = "random"
    c.mask.align_level = 1
    c.mask.scale = (0.5, 0.65)
    c.mask.min_coverage = 0.5
    c.train.batch_size = 24
    c.train.num_epochs = 100.0
    c.train.checkpoint_every_epochs = 10.0
    return c.lock()
