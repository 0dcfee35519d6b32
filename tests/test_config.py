"""Configs: every file builds, every rule is enforced, misspelt fields are refused."""

import importlib
import inspect
import json
import pathlib

import jax
import numpy as np
import optax
import pytest
from absl import flags
from ml_collections import config_flags

from hjepa_jax import cli
from hjepa_jax.config import base_config, build
from hjepa_jax.config import defaults as config_module
from hjepa_jax.config.defaults import REMOVED_FIELDS, differing_fields
from hjepa_jax.config.fields import flatten
from hjepa_jax.config.validation import validate
from hjepa_jax.data.base import Source, SourceInfo
from hjepa_jax.errors import InputError
from hjepa_jax.masks.masks import target_union
from hjepa_jax.models import hierarchy
from hjepa_jax.reporting.snapshot import build_snapshot_fn
from hjepa_jax.runs import run
from hjepa_jax.runs.workdir import load_config

CONFIGS = sorted(path.stem for path in pathlib.Path("configs").glob("[a-z]*.py"))
CIFAR10 = Source("cifar10", SourceInfo(50_000, 10_000, (32, 32, 3), tuple("abcdefghij")), list)


def load(name: str):
    return importlib.import_module(f"hjepa_jax.configs.{name}").get_config()


def test_the_documented_configs_exist():
    assert set(CONFIGS) >= {
        "shapes_tiny",
        "cifar10_patches",
        "cifar10_tiny",
        "cifar10_small",
        "m1_max_quick_val",
        "m1_max_full_20epoch",
        "m1_max_full_100epoch",
        "stl10_small",
        "imagenet100_small",
        "imagenet_base",
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_locked_short_and_valid(name):
    config = load(name)
    validate(config)
    build.build_model(config)
    build.build_optimizer(config, build.build_schedules(config, CIFAR10.num_images))
    with pytest.raises(AttributeError):
        config.optim.learning_rat = 1.0
    assert len(pathlib.Path(f"configs/{name}.py").read_text().splitlines()) <= 80


def test_m1_max_quick_val_is_the_reference_run():
    """12,051,264 parameters and 6,526,848 trainable, within 1 %; and its warm-up."""
    config = load("m1_max_quick_val")
    create = build.build_create_state(config, build.build_model(config), optax.identity())
    state = jax.eval_shape(create)
    trainable, target = map(run.num_params, (state.params, state.target_params))
    assert abs(trainable / 6_526_848 - 1) < 0.01
    assert abs((trainable + target) / 12_051_264 - 1) < 0.01
    assert build.build_masks(config).num_patches == 196
    assert config.model.num_levels == 2
    schedules = build.build_schedules(config, CIFAR10.num_images)
    assert schedules.steps_per_epoch == 1562
    assert f"{float(schedules.learning_rate_fn(50)):.2e}" == "3.20e-06"
    assert f"{float(schedules.learning_rate_fn(250)):.2e}" == "1.60e-05"


def test_the_masks_of_m1_max_full_100epoch_cover_the_grid_evenly_at_three_levels():
    config = load("m1_max_full_100epoch")
    assert config.model.num_levels == 3
    sample, n = build.build_masks(config), 2_000
    masks = jax.jit(sample)(jax.random.split(jax.random.PRNGKey(0), n))
    hidden = target_union(masks, 196)
    by_level = [
        np.asarray(hierarchy.hidden_cells(hidden, 14, level, config.mask.min_coverage)).mean(axis=0)
        for level in range(3)
    ]
    error = 4 * np.sqrt(0.571 * 0.429 / n)  # of 49 cells, 25 to 31 are hidden
    for coverage in by_level[:2]:
        assert np.abs(coverage - 28 / 49).max() < error
    assert by_level[2].min() > 0.52
    assert by_level[2].max() < 0.87  # a cell of 4 x 4 patches, of which half must be hidden


def test_dropping_hidden_patches_saves_two_fifths_of_the_arithmetic():
    """FLOPs of m1_max_quick_val against the same model whose context encoder computes on all.

    Both networks have half of their blocks, as tracing takes seconds: the share is the same.
    """
    config, flops = load("m1_max_quick_val"), []
    with config.unlocked():
        config.model.depth, config.model.predictor_depth = 6, 1
    for num_context in (None, 196):
        with config.unlocked():
            config.mask.num_context = num_context
        program = run.build_run(config, CIFAR10).lower(steps_per_call=1, donate=False)
        flops.append(program.cost_analysis()["flops"])
    assert 0.3 < flops[0] / flops[1] <= 0.6


def flops_and_params(config, **overrides):
    """XLA's count for a step, and the names of the networks that are trained."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(overrides)
    validate(config)
    built = run.build_run(config, Source("x", SourceInfo(240, 60, (16, 16, 3), ("a",)), list))
    program = built.lower(steps_per_call=1, donate=False)
    return program.cost_analysis()["flops"], set(jax.eval_shape(built.create)[0].params)


def test_a_term_of_weight_0_costs_nothing(tiny_config):
    """Without the levels: no target pass, no predictor pass, no gradient of either."""
    agree = {"loss.agreement_weight": 1.0, "data.local_views": 1, "data.local_size": 8}
    agree |= {"loss.regularizer": "none", "model.projection": (16, 8)}
    full, networks = flops_and_params(tiny_config, **agree)
    assert networks == {"context_encoder", "predictor", "projection"}
    one_pass, _ = flops_and_params(tiny_config, **agree, **{"loss.summary_weight": 0.0})
    none, networks = flops_and_params(tiny_config, **agree, **{"loss.level_weights": (0.0, 0.0)})
    assert networks == {"context_encoder", "projection"}
    teacher = {"loss.level_weights": (0.0, 0.0), "loss.teacher_weight": 1.0}
    with_target, _ = flops_and_params(tiny_config, **agree, **teacher)

    model = build.build_model(tiny_config)
    images = jax.ShapeDtypeStruct((16, 16, 16, 3), "float32")
    encoder = jax.eval_shape(model.context_encoder.init, jax.random.PRNGKey(0), images)
    encode = jax.jit(model.context_encoder.apply)
    target_pass = encode.lower(encoder, images).cost_analysis()["flops"]
    assert with_target - none > target_pass  # and the projection of the teacher
    assert full - none > target_pass + (full - one_pass)


def test_a_batch_in_parts_takes_the_arithmetic_of_a_whole_one(tiny_config):
    flops = []
    for num_parts in (1, 4):
        tiny_config.optim.accumulation_steps = num_parts
        flops.append(run.describe(tiny_config)["flops_per_image"])
    assert flops[0] == flops[1]


def test_every_field_has_a_reader():
    """An option that no code reads would be a promise not kept; a rule for it is no reader."""
    files = pathlib.Path("hjepa_jax").rglob("*.py")
    package = "".join(
        p.read_text() for p in files if p.name not in {"defaults.py", "validation.py"}
    )
    package += inspect.getsource(config_module.encoder_size)
    unread = [
        field
        for field in flatten(base_config().to_dict())
        if f".{field.split('.')[-1]}" not in package
    ]
    assert not unread


# Another value for each field of model, mask, loss and augmentation, and what it needs beside it.
OTHER_VALUES = {
    "data.image_size": (64, {}),
    "data.mean": ((0.5, 0.5, 0.5), {}),
    "data.std": ((0.5, 0.5, 0.5), {}),
    "data.crop_scale": ((0.3, 1.0), {}),
    "data.crop_ratio": ((1.0, 1.0), {}),
    "data.local_views": (2, {}),
    "data.local_size": (8, {"data.local_views": 1}),
    "data.local_crop_scale": ((0.2, 0.4), {"data.local_views": 1}),
    "data.local_patches": (3, {"data.local_views": 1}),
    **{
        f"data.{name}": (0.3, {})
        for name in (
            "horizontal_flip", "vertical_flip", "brightness", "contrast", "saturation", "hue",
            "jitter_probability", "grayscale", "blur", "solarize",
        )
    },
    "data.blur_sigma": ((0.5, 1.0), {}),
    "model.name": ("vit_small", {}),
    "model.width": (96, {}),
    "model.depth": (3, {}),
    "model.num_heads": (2, {}),
    "model.mlp_ratio": (2.0, {}),
    "model.patch_size": (8, {}),
    "model.stem": ("hmlp", {}),
    "model.num_levels": (1, {}),
    "model.num_summary_tokens": (2, {}),
    "model.num_registers": (2, {}),
    "model.positions": ("rope2d", {}),
    "model.layer_scale": (0.1, {}),
    "model.gelu": ("erf", {}),
    "model.layer_norm_epsilon": (0.1, {}),
    "model.drop_path": (0.1, {}),
    "model.remat": (True, {}),
    "model.dtype": ("bfloat16", {}),
    "model.predictor_width": (48, {}),
    "model.predictor_depth": (1, {}),
    "model.predictor_num_heads": (2, {}),
    "model.predictor_mode": ("cross", {}),
    "model.pyramid": ("add", {}),
    "mask.kind": ("random", {}),
    "mask.num_blocks": (2, {}),
    "mask.scale": ((0.1, 0.25), {}),
    "mask.progression": (("linear", 1.2), {"mask.kind": "hierarchical"}),
    "mask.aspect_ratio": ((0.5, 2.0), {}),
    "mask.context_scale": ((0.9, 1.0), {}),
    "mask.context_aspect_ratio": ((1.0, 1.0), {}),
    "mask.align_level": (0, {}),
    "mask.num_context": (12, {}),
    "mask.min_coverage": (0.5, {}),
    "loss.kind": ("mse", {}),
    "loss.level_weights": ((1.0, 0.5), {}),
    "loss.summary_weight": (0.5, {}),
    "loss.agreement_weight": (2.0, {}),
    "loss.spread_weight": (0.1, {"loss.agreement_weight": 1.0}),
    "loss.teacher_weight": (1.0, {}),
    "loss.spread_moment": ("views", {}),
    "model.projection": ((64, 32), {"loss.agreement_weight": 1.0}),
    "model.projection_input": ("summary+patches", {}),
    "loss.regularizer": ("sigreg", {}),
    "loss.regularizer_weight": (0.1, {}),
    "loss.variance_weight": (5.0, {}),
    "loss.covariance_weight": (5.0, {}),
    "loss.num_slices": (8, {}),
    "loss.regularized": ("both", {}),
}  # fmt: skip
# Fields of the same groups that say where images come from, or that the step reads by itself.
READ_ELSEWHERE = {
    "data.source", "data.dir", "data.streaming", "data.num_workers", "data.max_labelled",
    "data.train_split", "data.class_list", "data.follow_links", "model.target",
}  # fmt: skip


def test_every_option_changes_what_is_built():
    """Each by itself: a field that `build` forgets to pass on would leave its part as it is."""

    def parts(overrides):
        config = base_config()
        config.update_from_flattened_dict(overrides)
        return [
            part(config)
            for part in (
                build.build_model, build.build_masks, build.build_augment,
                build.build_local_views, build.build_objective,
            )
        ]  # fmt: skip

    groups = ("data.", "model.", "mask.", "loss.")
    fields = {field for field in flatten(base_config().to_dict()) if field.startswith(groups)}
    assert fields == OTHER_VALUES.keys() | READ_ELSEWHERE
    for field, (value, needs) in OTHER_VALUES.items():
        assert parts(needs) == parts(needs)
        assert parts(needs) != parts({**needs, field: value}), field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("platform", "tpu9"),
        ("data.image_size", 30),
        ("data.image_size", 0),
        ("data.streaming", "sometimes"),
        ("data.num_workers", -1),
        ("data.max_labelled", 0),
        ("data.train_split", "unlabelled"),
        ("data.class_list", "classes.txt"),
        ("data.mean", ()),
        ("data.std", (0.5,)),
        ("data.std", (0.5, 0.0, 0.5)),
        ("data.crop_scale", (0.5, 1.5)),
        ("data.crop_scale", (0.9, 0.5)),
        ("data.crop_scale", (0.9,)),
        ("data.horizontal_flip", 1.5),
        ("data.vertical_flip", -0.5),
        ("data.blur", 1.5),
        ("data.blur_sigma", (0.0, 1.0)),
        ("data.solarize", 2.0),
        ("data.brightness", -0.1),
        ("data.hue", 0.6),
        ("data.jitter_probability", 1.1),
        ("model.name", "vit_enormous"),
        ("model.num_levels", 5),
        ("model.num_levels", 0),
        ("model.positions", "rope9d"),
        ("model.dtype", "float64"),
        ("model.width", 190),
        ("model.predictor_width", 100),
        ("model.num_summary_tokens", -1),
        ("model.num_registers", -1),
        ("model.layer_scale", -0.1),
        ("model.gelu", "relu"),
        ("model.layer_norm_epsilon", 0.0),
        ("model.drop_path", 1.0),
        ("model.predictor_mode", "guess"),
        ("model.pyramid", "tower"),
        ("model.target", "teacher"),
        ("model.target", "online"),
        ("mask.kind", "stripes"),
        ("mask.progression", ("geometric",)),
        ("mask.progression", ("cubic", 1.5)),
        ("mask.progression", ("linear", 0.5)),
        ("mask.progression", ("linear", "a")),
        ("mask.scale", (0.0, 0.2)),
        ("mask.scale", ("a", "b")),
        ("mask.num_blocks", 0),
        ("mask.align_level", 4),
        ("mask.min_coverage", 0.0),
        ("loss.kind", "l3"),
        ("loss.level_weights", (1.0,)),
        ("loss.level_weights", (1.0, -1.0)),
        ("loss.regularizer", "hope"),
        ("loss.num_slices", 0),
        ("loss.summary_weight", -1.0),
        ("data.local_views", 2),  # without agreement
        ("data.local_views", -1),
        ("data.local_patches", 0),
        ("loss.agreement_weight", 1.0),  # without a second view
        ("loss.agreement_weight", -1.0),
        ("loss.spread_weight", -1.0),
        ("loss.teacher_weight", 1.0),  # without agreement
        ("loss.teacher_weight", -1.0),
        ("loss.spread_moment", "epoch"),
        ("model.stem", "conv"),
        ("model.projection_input", "pixels"),
        ("model.projection", (512,)),
        ("model.projection", (512, 0)),
        ("model.projection", (512, 2.5)),
        ("data.local_crop_scale", (0.5, 0.2)),
        ("optim.kind", "sgd"),
        ("optim.decay_epochs", -1.0),
        ("optim.b1", 1.0),
        ("optim.muon_momentum", 1.0),
        ("optim.ema_momentum", (0.9, 1.0, "sine")),
        ("optim.ema_momentum", (0.9, 1.1, "cosine")),
        ("optim.accumulation_steps", 3),
        ("train.batch_size", 0),
        ("train.num_steps", 0),
        ("log.every_steps", 0),
        ("log.figures_every_epochs", -1.0),
        ("eval.num_val", 0),
        ("seed", -1),
        ("seed", True),
        ("seed", None),
        ("platform", None),
        ("data.image_size", 10**18),
        ("data.mean", (0.1, 0.2, "a")),
        ("data.std", (0.1, float("nan"), 0.1)),
        ("data.crop_scale", ((1, 2), 1)),
        ("data.horizontal_flip", float("nan")),
        ("model.width", 10**18),
        ("model.depth", 10**9),
        ("model.num_levels", 99_999),
        ("model.mlp_ratio", 1e-9),
        ("model.patch_size", 10**18),
        ("mask.align_level", 10**9),
        ("mask.num_blocks", 10**9),
        ("mask.scale", (0.1, float("inf"))),
        ("loss.level_weights", ("a", "b")),
        ("loss.level_weights", (1, (2, 3))),
        ("loss.level_weights", (float("nan"), 1.0)),
        ("optim.learning_rate", float("inf")),
        ("optim.learning_rate", 1e30),
        ("optim.b1", float("nan")),
        ("optim.ema_momentum", (0.9, 1.0, 1.0)),
        ("optim.ema_momentum", (float("nan"), 1.0, "cosine")),
        ("train.batch_size", 2**40),
        ("train.num_steps", 2**31),
        ("train.steps_per_call", 10**9),
        ("eval.batch_size", 10**9),
        ("parallel.cpu_devices", 10**9),
        ("parallel.fsdp", 0),
    ],
)
def test_a_broken_rule_is_named(field, value):
    config = base_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as error:
        validate(config)
    assert error.value.field == field
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("others", "rule"),
    [
        ({"model.num_levels": 1}, "num_levels of at least 2"),
        (
            {
                "model.target": "online",
                "loss.regularizer": "sigreg",
                "loss.regularized": "both",
            },
            "needs model.target='ema'",
        ),
    ],
)
def test_a_pyramid_needs_two_levels_and_an_ema(others, rule):
    config = base_config()
    config.update_from_flattened_dict(others)
    validate(config)
    config.model.pyramid = "add"
    with pytest.raises(InputError, match=rule) as error:
        validate(config)
    assert error.value.field == "model.pyramid"


@pytest.mark.parametrize(
    "weights",
    [
        {"loss.regularizer_weight": 0.0},
        {"loss.variance_weight": 0.0, "loss.covariance_weight": 0.0},
        {"loss.regularizer": "sigreg", "loss.regularizer_weight": 0.0},
    ],
    ids=str,
)
def test_a_regularizer_without_a_weight_is_refused(weights):
    config = base_config()
    config.update_from_flattened_dict(weights)
    with pytest.raises(InputError, match="must be none where") as error:
        validate(config)
    assert error.value.field == "loss.regularizer"
    config.loss.regularizer = "none"
    validate(config)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("loss.spread_weight", 0.0, "all images would be alike"),
        ("data.local_patches", 17, "from 1 to 16"),
        ("model.projection", (8, 1), "from 2 to 8192"),
        ("train.batch_size", 1, "loss.agreement_weight=1.0 compares"),
    ],
)
def test_views_that_agree_need_images_and_room_to_differ(field, value, rule):
    config = base_config()
    agreeing = {
        "loss.agreement_weight": 1.0, "data.local_views": 1, "loss.regularizer": "none",
    }  # fmt: skip
    config.update_from_flattened_dict(agreeing)
    validate(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=rule) as error:
        validate(config)
    assert error.value.field == field


def test_a_loss_without_any_term_is_refused():
    config = base_config()
    config.loss.level_weights, config.loss.regularizer = (0.0, 0.0), "none"
    with pytest.raises(InputError, match=r"^loss.level_weights=\(0.0, 0.0\): leaves the loss wi"):
        validate(config)
    config.loss.regularizer = "vicreg"
    validate(config)


@pytest.mark.parametrize("size", [18, 0, -4, 516])
def test_local_views_are_whole_patches(size):
    config = base_config()
    config.update_from_flattened_dict(
        {"loss.agreement_weight": 1.0, "data.local_views": 2, "data.local_size": size}
    )
    with pytest.raises(InputError, match=r"1 to 128 patches of model\.patch_size=4") as error:
        validate(config)
    assert error.value.field == "data.local_size"


def test_a_target_without_ema_needs_a_regularizer_of_what_it_is_made_of():
    config = base_config()
    config.model.target, config.loss.regularizer = "online", "sigreg"
    for regularized, weight, fits in (
        ("summary", 0.1, False), ("context", 0.0, False), ("context", 0.1, True),
    ):  # fmt: skip
        config.loss.regularized, config.loss.regularizer_weight = regularized, weight
        if fits:
            validate(config)
        else:
            with pytest.raises(InputError, match=r"model.target='online': needs loss.regularizer"):
                validate(config)


def test_the_ema_has_the_kind_of_the_config():
    config = base_config()
    config.train.batch_size, config.train.num_steps = 10, 11
    config.optim.ema_momentum = (0.9, 1.0, "linear")
    momentum = build.build_schedules(config, 100).ema_momentum_fn
    found = [float(momentum(step)) for step in (0, 5, 11)]
    assert found == pytest.approx([0.9, 0.9 + 0.1 * 5 / 11, 1.0])
    config.optim.ema_momentum = (0.9, 1.0, "constant")
    assert float(build.build_schedules(config, 100).ema_momentum_fn(5)) == pytest.approx(0.9)


def test_rotary_positions_need_heads_of_a_width_that_divides_by_four():
    config = base_config()
    config.model.positions = "rope2d"
    validate(config)
    config.model.width, config.model.num_heads = 180, 6
    with pytest.raises(InputError, match=r"model.width=180: must be a multiple of 4 times 6 heads"):
        validate(config)


def test_a_list_of_classes_and_a_split_without_labels_exclude_each_other():
    config = load("imagenet100_small")
    config.data.train_split = "unlabelled"
    with pytest.raises(InputError, match=r"data.class_list=.*data.train_split=None"):
        validate(config)


def test_a_section_that_lost_its_fields_is_refused():
    """`--config.optim={}` replaces a whole section."""
    config = base_config()
    config.optim = {"learning_rate": 1.0}
    with pytest.raises(InputError, match=r"optim.accumulation_steps=None: is missing"):
        validate(config)


def test_a_number_that_python_does_not_print_is_still_refused_in_a_line():
    config = base_config()
    config.mask.scale = (1 << 99_999, 1.0)
    with pytest.raises(InputError, match=r"^mask.scale=<tuple>: must be a tuple of numbers"):
        validate(config)


@pytest.mark.parametrize("field", ["train.num_epochs", "optim.warmup_epochs", "optim.decay_epochs"])
def test_epochs_of_more_steps_than_can_be_counted_are_refused(field):
    config = base_config()
    config.update_from_flattened_dict({field: 2e9})
    validate(config)
    with pytest.raises(InputError, match=rf"{field}=2000000000.0: must be at most 2147483647 step"):
        build.build_schedules(config, 50_000)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.seed[0]=1", "seed[0]"),
        ("--config.data.mean[9]=1", "--config.data.mean[9]: tuple index out of range"),
        ("--config.seed.x=1", "seed.x"),
        ("--config.=1", "--config.: is not a field"),
        ("--config.mask.scale=" + "-" * 9_999 + "1", ""),
        ("--config.data.mean[0]=x", "data.mean[0]='x': must be a number"),
        ("--config.optim=3", "optim='3': is a group of fields"),
        ("--config.model.width=" + "9" * 5_000, "999...': must be a whole number"),
    ],
    ids=range(8),
)
def test_an_override_that_cannot_be_set_ends_in_one_line(override, words, capsys):
    values, argv = flags.FlagValues(), ["main", "--config=configs/shapes_tiny.py", override]
    config_flags.DEFINE_config_file("config", None, "", values, lock_config=True, sys_argv=argv)

    def parse_and_check() -> None:
        try:
            cli.parse_flags(argv, values)
            validate(values.config)  # how deep Python's parser goes is the platform's
        except InputError as error:
            cli.fail(str(error))

    with pytest.raises(SystemExit) as stop:
        parse_and_check()
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert words in line
    assert len(line) < 2_020


def edited(edit) -> str:
    config = base_config().to_dict()
    edit(config)
    return json.dumps(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "not an object"),
        ("[" * 99_999, "recursion"),
        (edited(lambda c: c.update(colour="red")), "unknown colour"),
        (edited(lambda c: c["model"].update(teacher={"width": 3})), "unknown model.teacher.width"),
        (edited(lambda c: c["model"].update(expander_width=8)), "unknown model.expander_width"),
        (edited(lambda c: c["mask"].update(num_masks=2)), "unknown mask.num_masks"),
        (edited(lambda c: c.update(model=3)), "unknown model"),
        (edited(lambda c: c.update(seed="a")), "seed"),
        (edited(lambda c: c.update(seed=None)), "seed=None"),
        (edited(lambda c: c["mask"].update(scale=[{"a": 1}, [2]])), "mask.scale"),
        (edited(lambda c: c["optim"].update(learning_rate=float("nan"))), "optim.learning_rate"),
    ],
    ids=range(12),
)
def test_a_config_json_of_another_version_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"its config.json is no config of this version") as error:
        load_config(tmp_path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_json_comes_back_as_saved_with_defaults_for_missing_fields(tmp_path):
    config = load("m1_max_quick_val")
    saved = config.to_dict()
    saved.pop("log")
    saved["parallel"].pop("cpu_devices")
    saved["model"].pop("num_registers")  # as of a version that did not have the field
    for field, value in REMOVED_FIELDS.items():
        group, name = field.split(".")
        saved[group][name] = value
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert differing_fields(load_config(tmp_path).to_dict(), config.to_dict()) == []


def test_a_workdir_that_cannot_be_looked_at_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        load_config(tmp_path / ("x" * 300))
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(InputError, match="holds no run"):
            load_config(workdir)


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
    new.data.num_workers = 9
    assert differing_fields(old.to_dict(), new.to_dict()) == []
    new.mask.scale = (0.1, 0.2)
    new.seed = 3
    assert differing_fields(old.to_dict(), new.to_dict()) == ["mask.scale", "seed"]


@pytest.mark.parametrize("regularizer", ["vicreg", "sigreg"])
def test_statistics_over_a_batch_need_two_images(regularizer):
    config = base_config()
    config.loss.regularizer, config.train.batch_size = regularizer, 1
    with pytest.raises(InputError, match=f"train.batch_size=1.*{regularizer}"):
        validate(config)


@pytest.mark.parametrize("kind", ["hierarchical", "random"])
def test_every_kind_of_mask_is_built_shown_and_trained_with(kind, tiny_config):
    tiny_config.mask.kind, tiny_config.loss.regularizer = kind, "sigreg"
    tiny_config.mask.progression = ("geometric", 1.0)  # so that level 1 fits the 4 x 4 patches
    source = Source("x", SourceInfo(240, 60, (16, 16, 3), ("a",)), list)
    built = run.build_run(tiny_config, source)
    state, window = jax.eval_shape(built.create)
    assert "loss_sigreg" in window.averages.__annotations__
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), "uint8")
    snapshot = build_snapshot_fn(tiny_config, built.model)
    shown = jax.eval_shape(snapshot, state.params, state.target_params, images)
    assert shown.states[0].shape == (2, 4, 4)
