"""ViT-Small on STL-10 at 96x96, patch 8: trains on its 100,000 unlabelled images, streamed.

  python -m hjepa_jax.main --config=configs/stl10_small.py

Probes use its 5,000 labelled training images and 8,000 test images. No run has been completed yet.
"""

from hjepa_jax.config import Config, base_config


def get_config() -> Config:
    c = base_config()
    c.data.source = "tfds:stl10"
    c.data.streaming = "always"
    c.data.train_split = "unlabelled"
    c.data.image_size = 96
    c.data.crop_scale = (0.4, 1.0)
    c.data.mean = (0.447, 0.440, 0.407)
    c.data.std = (0.260, 0.257, 0.271)

    c.model.name = "vit_small"
    c.model.patch_size = 8  # 144 patches
    c.model.num_levels = 3
    c.model.positions = "sincos2d"
    c.model.predictor_width = 192
    c.model.predictor_depth = 4
    c.model.predictor_num_heads = 3

    c.mask.align_level = 0
    c.mask.scale = (0.1, 0.2)
    c.loss.regularizer_weight = 0.01

    c.optim.learning_rate = 1e-3
    c.optim.warmup_epochs = 5.0
    c.optim.ema_momentum = (0.99, 1.0, "cosine")
    c.train.batch_size = 256
    c.train.num_epochs = 100.0
    c.eval.every_epochs = 5.0
    c.eval.num_val = 1_000
    c.train.checkpoint_every_epochs = 1.0
    return c.lock()
