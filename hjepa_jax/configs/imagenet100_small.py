"""ViT-Small/16 on the 100 ImageNet classes of imagenet100_classes.txt, at 224, streamed.

  python -m hjepa_jax.main --config=configs/imagenet100_small.py

ImageNet needs a licence: put its archives into the folder that the error message of
tensorflow-datasets names. The first start reads all 1.28 million labels once, to find the classes.
No run has been completed yet.

References:
  Tian et al. 2020, Contrastive multiview coding, arXiv 1906.05849 (the 100 classes).
"""

from hjepa_jax.config import Config, base_config


def get_config() -> Config:
    c = base_config()
    c.data.source = "tfds:imagenet2012"
    c.data.streaming = "always"
    c.data.num_workers = 8
    c.data.class_list = "configs/imagenet100_classes.txt"
    c.data.image_size = 224
    c.data.crop_scale = (0.3, 1.0)
    c.data.mean = (0.485, 0.456, 0.406)
    c.data.std = (0.229, 0.224, 0.225)

    c.model.name = "vit_small"
    c.model.patch_size = 16  # 196 patches
    c.model.num_levels = 3
    c.model.positions = "sincos2d"
    c.model.dtype = "bfloat16"
    c.model.predictor_width = 192
    c.model.predictor_depth = 6
    c.model.predictor_num_heads = 6

    c.mask.align_level = 0
    c.mask.scale = (0.15, 0.2)
    c.loss.regularizer_weight = 0.01

    c.optim.learning_rate = 1e-3
    c.optim.warmup_epochs = 10.0
    c.optim.final_learning_rate = 1e-6
    c.optim.ema_momentum = (0.996, 1.0, "linear")
    c.train.batch_size = 512
    c.train.num_epochs = 200.0
    c.eval.every_epochs = 10.0
    c.train.checkpoint_every_epochs = 5.0
    return c.lock()
