"""ViT-Small/16 on your own images at 224x224, with the recipe of photos_96.

  python -m hjepa_jax.main --config=configs/photos_224.py --config.data.source=folder:photos

For a GPU: 196 patches; the encoder sees 49 of each view, in bfloat16. No run on photos has
been made yet.
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import photos_96


def get_config() -> Config:
    c = photos_96.get_config().unlock()
    c.data.image_size = 224
    c.data.num_workers = 8
    c.model.patch_size = 16
    c.model.dtype = "bfloat16"
    return c.lock()
