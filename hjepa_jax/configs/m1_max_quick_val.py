"""The 5-epoch validation run of the reference system: ViT-Tiny/16 at 224, two levels, batch 32.

  python -m hjepa_jax.main --config=configs/m1_max_quick_val.py

12.09 M parameters with the target encoder, 6.56 M trainable; the reference, in PyTorch on an
Apple M1 Max, had 12,051,264 and 6,526,848, and ran 102 images/s.
"""

from hjepa_jax.config import Config, base_config


def get_config() -> Config:
    c = base_config()
    c.data.source = "tfds:cifar10"
    c.data.image_size = 224  # CIFAR-10 enlarged, as the reference did
    c.data.crop_scale = (0.8, 1.0)
    c.data.brightness = c.data.contrast = c.data.saturation = 0.0

    c.model.name = "vit_tiny"
    c.model.patch_size = 16  # 196 patches
    c.model.num_levels = 2
    c.model.num_summary_tokens = 1
    c.model.predictor_width = 192
    c.model.predictor_depth = 2
    c.model.predictor_num_heads = 4

    c.mask.num_blocks = 4
    c.mask.scale = (0.15, 0.25)
    c.mask.aspect_ratio = (0.75, 1.5)

    c.loss.summary_weight = 0.0  # the reference has no summary pass
    c.loss.regularizer = "vicreg"
    c.loss.regularizer_weight = 0.1
    c.loss.regularized = "context"

    c.optim.learning_rate = 1e-4
    c.optim.warmup_epochs = 1.0
    c.optim.weight_decay = 0.04
    c.optim.b1, c.optim.b2 = 0.9, 0.95
    c.optim.clip_norm = 3.0
    c.optim.ema_momentum = (0.996, 1.0, "linear")

    c.train.batch_size = 32
    c.train.num_epochs = 5.0
    return c.lock()
