"""Which parts `cifar10_tiny` should have: rows for `experiments/unseen.py`.

ViT 128 x 4 on CIFAR-10; the masked view and two further crops of each image, 16 of 64 patches each.

  python experiments/unseen.py --config=experiments/recipes/flagship.py --seeds=0,1,2
"""

from hjepa_jax.config import Config
from hjepa_jax.configs import cifar10_tiny

SHARED = {
    "model.width": 128, "model.depth": 4, "model.num_heads": 4, "model.predictor_width": 64,
    "model.predictor_num_heads": 2, "model.stem": "linear",
    "data.crop_scale": (0.6, 1.0), "data.local_crop_scale": (0.3, 1.0), "data.hue": 0.0,
    "data.jitter_probability": 1.0, "data.local_views": 2,
    "loss.teacher_weight": 0.0, "loss.spread_moment": "batch",
    "train.batch_size": 128, "train.num_epochs": 1.5, "optim.warmup_epochs": 0.15,
    "eval.every_epochs": 0.0,
}  # fmt: skip
TEACHER = {"loss.teacher_weight": 1.0}
PATCHES = {"model.projection_input": "summary+patches"}
RUNNING = {"loss.spread_moment": "running", "loss.spread_weight": 5.0}  # a tenth of the gradient
VIEWS = {
    "data.crop_scale": (0.45, 1.0), "data.local_crop_scale": (0.2, 1.0), "data.hue": 0.1,
    "data.jitter_probability": 0.8,
}  # fmt: skip
STEM = {"model.stem": "hmlp"}
ROWS = {
    "control": {},
    "teacher": TEACHER,
    "teacher_3": {"loss.teacher_weight": 3.0},
    "patches": PATCHES,
    "running_moment": RUNNING,
    "moment_of_all_views": {"loss.spread_moment": "views"},
    "views": VIEWS,
    "stem": STEM,
    "all": {**TEACHER, **PATCHES, **RUNNING, **VIEWS, **STEM},
    # The teacher is a view that costs nothing: it takes the place of a further crop.
    "teacher_for_crop": {**TEACHER, "data.local_views": 1},
    "all_for_crop": {**TEACHER, **PATCHES, **RUNNING, **VIEWS, **STEM, "data.local_views": 1},
    "no_levels": {"loss.level_weights": (0.0, 0.0)},
}


def get_config() -> Config:
    """The config that all rows change."""
    c = cifar10_tiny.get_config().unlock()
    c.update_from_flattened_dict(SHARED)
    return c.lock()
