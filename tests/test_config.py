"""Configs: every file builds, every rule is enforced, misspelt fields are refused."""

import importlib
import pathlib

import jax
import pytest

from hjepa_jax import build, run
from hjepa_jax.config import base_config, differing_fields, flatten, validate
from hjepa_jax.data.sources import Source, SourceInfo
from hjepa_jax.errors import InputError

CONFIGS = sorted(path.stem for path in pathlib.Path("configs").glob("[a-z]*.py"))
CIFAR10 = Source("cifar10", SourceInfo(50_000, 10_000, (32, 32, 3), tuple("abcdefghij")), list)


def load(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


def test_the_documented_configs_exist():
    assert set(CONFIGS) >= {
        "shapes_tiny",
        "cifar10_tiny",
        "m1_max_quick_val",
        "m1_max_full_20epoch",
        "m1_max_full_100epoch",
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_locked_short_and_builds(name):
    config = load(name)
    validate(config)
    built = run.build_run(config, CIFAR10)
    state, _ = jax.eval_shape(built.create)
    assert run.num_params(state.params) > 0
    with pytest.raises(AttributeError):
        config.optim.learning_rat = 1.0
    assert len(pathlib.Path(f"configs/{name}.py").read_text().splitlines()) <= 80


def test_m1_max_quick_val_is_the_reference_run():
    """12,051,264 parameters and 6,526,848 trainable, within 1 %; and its warm-up."""
    config = load("m1_max_quick_val")
    built = run.build_run(config, CIFAR10)
    state, _ = jax.eval_shape(built.create)
    trainable, target = map(run.num_params, (state.params, state.target_params))
    assert abs(trainable / 6_526_848 - 1) < 0.01
    assert abs((trainable + target) / 12_051_264 - 1) < 0.01
    assert build.build_masks(config).num_patches == 196
    assert config.model.num_levels == 2
    assert built.schedules.steps_per_epoch == 1562
    assert f"{float(built.schedules.learning_rate_fn(50)):.2e}" == "3.20e-06"
    assert f"{float(built.schedules.learning_rate_fn(250)):.2e}" == "1.60e-05"


def test_every_field_has_a_reader():
    """An option that no code reads would be a promise not kept."""
    package = "".join(p.read_text() for p in pathlib.Path("hjepa_jax").rglob("*.py"))
    package = package.replace(pathlib.Path("hjepa_jax/config.py").read_text(), "")
    package += pathlib.Path("hjepa_jax/config.py").read_text().partition("def validate")[2]
    unread = [
        field
        for field in flatten(base_config().to_dict())
        if f".{field.split('.')[-1]}" not in package
    ]
    # mask.kind has one value so far: choosing it is checking it.
    assert set(unread) <= {"mask.kind"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("platform", "tpu9"),
        ("data.image_size", 30),
        ("data.image_size", 0),
        ("data.mean", (0.5,)),
        ("data.std", (0.5, 0.0, 0.5)),
        ("data.crop_scale", (0.5, 1.5)),
        ("data.crop_scale", (0.9, 0.5)),
        ("data.crop_scale", (0.9,)),
        ("data.horizontal_flip", 1.5),
        ("data.brightness", -0.1),
        ("model.name", "vit_enormous"),
        ("model.num_levels", 5),
        ("model.num_levels", 0),
        ("model.positions", "rope9d"),
        ("model.dtype", "float64"),
        ("model.width", 190),
        ("model.predictor_width", 100),
        ("model.num_summary_tokens", -1),
        ("mask.kind", "stripes"),
        ("mask.scale", (0.0, 0.2)),
        ("mask.scale", ("a", "b")),
        ("mask.num_blocks", 0),
        ("mask.align_level", 4),
        ("mask.min_coverage", 0.0),
        ("loss.kind", "l3"),
        ("loss.level_weights", (1.0,)),
        ("loss.level_weights", (1.0, -1.0)),
        ("loss.regularizer", "hope"),
        ("loss.summary_weight", -1.0),
        ("optim.b1", 1.0),
        ("optim.ema_momentum", (0.9, 1.0, "sine")),
        ("optim.ema_momentum", (0.9, 1.1, "cosine")),
        ("optim.accumulation_steps", 3),
        ("train.batch_size", 0),
        ("train.num_steps", 0),
        ("log.every_steps", 0),
        ("eval.num_val", 0),
    ],
)
def test_a_broken_rule_is_named(field, value):
    config = base_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as error:
        validate(config)
    assert error.value.field == field
    assert repr(value) in str(error.value)


def test_summary_losses_need_summary_tokens():
    config = base_config()
    config.model.num_summary_tokens = 0
    with pytest.raises(InputError, match=r"loss.summary_weight.*num_summary_tokens"):
        validate(config)
    config.loss.summary_weight = 0.0
    with pytest.raises(InputError, match=r"loss.regularized.*num_summary_tokens"):
        validate(config)
    config.loss.regularized = "context"
    validate(config)


def test_batch_larger_than_the_data_set_is_refused():
    config = load("cifar10_tiny")
    config.train.batch_size = 50_001
    with pytest.raises(InputError, match=r"train.batch_size=50001.*50000"):
        run.build_run(config, CIFAR10)


def test_masks_that_no_block_fits_are_refused():
    config = load("cifar10_tiny")
    config.mask.scale = (0.001, 0.002)
    with pytest.raises(InputError, match=r"mask.scale=\(0.001, 0.002\): no block"):
        run.build_run(config, CIFAR10)


def test_data_that_does_not_fit_the_device_is_refused():
    huge = Source("x", SourceInfo(10**7, 1, (64, 64, 3), ("a",)), list)
    with pytest.raises(InputError, match=r"data.source.*GiB"):
        run.build_run(load("cifar10_tiny"), huge)


def test_number_of_steps_wins_over_epochs_and_warmup_keeps_its_meaning():
    config = load("m1_max_quick_val")
    config.train.num_steps = 300
    schedules = build.build_schedules(config, 50_000)
    assert schedules.num_steps == 300
    assert f"{float(schedules.learning_rate_fn(250)):.2e}" == "1.60e-05"


def test_only_fields_that_matter_count_as_another_config():
    old, new = base_config(), base_config()
    new.log.every_steps, new.train.steps_per_call, new.data.dir = 7, 5, "elsewhere"
    assert differing_fields(old.to_dict(), new.to_dict()) == []
    new.mask.scale = (0.1, 0.2)
    new.seed = 3
    assert differing_fields(old.to_dict(), new.to_dict()) == ["mask.scale", "seed"]
