"""The probe command gives a mean only for runs that differ in their seed alone."""

import pytest

from hjepa_jax.config import base_config
from hjepa_jax.runs import seeds


def configs(first, second):
    made = []
    for seed, changes in enumerate((first, second)):
        config = base_config()
        config.seed = seed
        config.update_from_flattened_dict(changes)
        made.append(config)
    return made


@pytest.mark.parametrize(
    ("changes", "steps", "told"),
    [
        ({}, (4, 4), ""),
        ({}, None, ""),  # each run at its own best step
        ({"log.every_steps": 7, "data.dir": "elsewhere", "platform": "cpu"}, (4, 4), ""),
        ({}, (4, 6), "the runs differ in step (4, 6)"),
        ({"seed": 0}, (4, 4), "runs have the same seed (0, 0)"),
        (
            {"optim.learning_rate": 0.5, "mask.scale": (0.1, 0.1)}, (4, 4),
            "the runs differ in mask.scale ((0.15, 0.25), (0.1, 0.1)); "
            "optim.learning_rate (0.001, 0.5)",
        ),
        ({"eval.num_val": 10}, (4, 4), "the runs differ in eval.num_val (5000, 10)"),
        (
            {"data.source": "shapes"}, (4, 4),
            "the runs differ in data.source ('tfds:cifar10', 'shapes')",
        ),
    ],
)  # fmt: skip
def test_runs_that_differ_in_more_than_the_seed_get_no_mean(changes, steps, told):
    assert seeds.differences(configs({}, changes), steps) == told


@pytest.mark.parametrize(
    ("source", "images", "told"),
    [
        ("folder:x", ("all-a", "all-b"), "the runs differ in training images ('all-a', 'all-b')"),
        ("folder:x", ("all-a", "all-a"), ""),
        ("folder:x", ("all-a", None), ""),  # unknown
        ("shapes", ("all-a", "all-b"), ""),  # drawn by the seed
    ],
)
def test_runs_on_other_images_get_no_mean(source, images, told):
    changes = {"data.source": source}
    assert seeds.differences(configs(changes, changes), (4, 4), images) == told
