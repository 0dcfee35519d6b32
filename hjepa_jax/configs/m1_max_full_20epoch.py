"""The reference system's 20-epoch plan: ViT-Tiny/16 at 224 with a deeper predictor.

python -m hjepa_jax.main --config=configs/m1_max_full_20epoch.py
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import m1_max_quick_val


def get_config() -> Config:
    c = m1_max_quick_val.get_config().unlock()
    c.model.predictor_depth = 4
    c.optim.warmup_epochs = 4.0
    c.train.num_epochs = 20.0
    return c.lock()
