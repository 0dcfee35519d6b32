"""ViT-Base/16 on ImageNet-1k at 224, streamed: for several accelerators.

  python -m hjepa_jax.main --config=configs/imagenet_base.py

Like imagenet100_small, with all 1.28 million training images. Probes use 50,000 labelled training
images, always the same, and all 50,000 validation images: 15 GB of memory in each process. No run
has been completed yet.
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import imagenet100_small


def get_config() -> Config:
    c = imagenet100_small.get_config().unlock()
    c.data.class_list = None
    c.data.num_workers = 16
    c.data.max_labelled = 50_000

    c.model.name = "vit_base"
    c.model.predictor_width = 384
    c.model.predictor_num_heads = 12

    c.optim.warmup_epochs = 40.0
    c.train.batch_size = 2048
    c.train.num_epochs = 300.0
    return c.lock()
