"""A small ViT on procedural shapes: no download, minutes on two CPU cores.

  python -m hjepa_jax.main --config=configs/shapes_tiny.py

The loss predicts hidden patches, and compares the views of an image: the masked view and three
small crops, which show other copies of the same shape. experiments/shapes_tiny has the scores of
three seeds, and the settings that were tried.
"""

from hjepa_jax.config import Config, base_config


def get_config() -> Config:
    c = base_config()
    c.data.source = "shapes"
    c.data.mean = (0.5, 0.5, 0.5)
    c.data.std = (0.25, 0.25, 0.25)
    c.data.local_views = 3
    c.data.local_size = 0.5
    c.data.local_crop_scale = (0.2, 0.5)
    # Colour and polarity (light on dark or dark on light) do not depend on the class.
    c.data.brightness = c.data.contrast = c.data.saturation = 0.4
    c.data.grayscale = 0.8
    c.data.solarize = 0.5

    c.model.width = 64
    c.model.depth = 3
    c.model.num_heads = 2
    c.model.positions = "rope2d"
    c.model.predictor_width = 32
    c.model.predictor_depth = 1
    c.model.predictor_num_heads = 1
    c.model.projection = (256, 64)

    c.mask.align_level = 0
    c.mask.scale = (0.09, 0.19)  # 3x2, 3x3, 3x4 or 4x3 of the 8x8 patches
    c.mask.num_context = 0.25
    c.loss.level_weights = (0.5, 0.5)
    c.loss.summary_weight = 0.0
    c.loss.agreement_weight = 8.0
    c.loss.spread_weight = 0.5
    c.loss.regularizer = "none"
    c.loss.regularizer_weight = 0.0

    c.optim.kind = "muon"
    c.optim.learning_rate = 8e-3
    c.optim.warmup_epochs = 0.5
    c.train.batch_size = 64
    c.train.num_epochs = 7.0
    c.eval.every_epochs = 3.5
    c.eval.knn_bank_size = 2_000
    c.log.figures_every_epochs = 0.0  # the report at the end has the same pictures
    return c.lock()
