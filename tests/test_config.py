"""Configs: every file builds, every rule is enforced, misspelt fields are refused."""

import importlib
import inspect
import json
import pathlib

import jax
import numpy as np
import optax
import pytest

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
from tests import programs

CONFIGS = sorted(path.stem for path in pathlib.Path("configs").glob("[a-z]*.py"))
DOCUMENTED = (
    "shapes_tiny cifar10_patches cifar10_tiny cifar10_small m1_max_quick_val m1_max_full_20epoch "
    "m1_max_full_100epoch stl10_small imagenet100_small imagenet_base"
)
CIFAR10 = Source("cifar10", SourceInfo(50_000, 10_000, (32, 32, 3), tuple("abcdefghij")), list)
SMALL = Source("x", SourceInfo(240, 60, (16, 16, 3), ("a",)), list)
HUGE = Source("x", SourceInfo(10**7, 1, (64, 64, 3), ("a",)), list)


def load(name: str):
    return importlib.import_module(f"hjepa_jax.configs.{name}").get_config()


def changed(*overrides):
    config = base_config()
    for fields in overrides:
        config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_locked_short_and_valid(name):
    config = load(name)
    validate(config)
    build.build_model(config)
    build.build_optimizer(config, build.build_schedules(config, CIFAR10.num_images))
    with pytest.raises(AttributeError):
        config.optim.learning_rat = 1.0
    assert len(pathlib.Path(f"configs/{name}.py").read_text().splitlines()) <= 80
    assert set(CONFIGS) >= set(DOCUMENTED.split())


def test_m1_max_quick_val_is_the_reference_run():
    """It has 12,051,264 parameters, and 6,526,848 of them are trainable, within 1 %.

    The warm-up of the learning rate also agrees.
    """
    config = load("m1_max_quick_val")
    create = build.build_create_state(config, build.build_model(config), optax.identity())
    state = jax.eval_shape(create)
    trainable, target = map(run.num_params, (state.params, state.target_params))
    assert abs(trainable / 6_526_848 - 1) < 0.01
    assert abs((trainable + target) / 12_051_264 - 1) < 0.01
    assert (build.build_masks(config).num_patches, config.model.num_levels) == (196, 2)
    schedules = build.build_schedules(config, CIFAR10.num_images)
    assert schedules.steps_per_epoch == 1562
    assert f"{float(schedules.learning_rate_fn(50)):.2e}" == "3.20e-06"
    config.train.num_steps = 300  # overrides num_epochs, but does not change the warm-up
    schedules = build.build_schedules(config, CIFAR10.num_images)
    assert schedules.num_steps == 300
    assert f"{float(schedules.learning_rate_fn(250)):.2e}" == "1.60e-05"


def test_the_masks_of_m1_max_full_100epoch_cover_the_grid_evenly_at_three_levels():
    config = load("m1_max_full_100epoch")
    assert config.model.num_levels == 3
    sample, n = build.build_masks(config), 1_000
    masks = jax.jit(sample)(jax.random.split(jax.random.PRNGKey(0), n))
    hidden = target_union(masks, 196)
    by_level = [
        np.asarray(hierarchy.hidden_cells(hidden, 14, level, config.mask.min_coverage)).mean(axis=0)
        for level in range(3)
    ]
    error = 4 * np.sqrt(0.571 * 0.429 / n)  # 25 to 31 of the 49 cells are hidden
    for coverage in by_level[:2]:
        assert np.abs(coverage - 28 / 49).max() < error
    assert by_level[2].min() > 0.52
    assert by_level[2].max() < 0.87  # a cell has 4 x 4 patches, and half of them must be hidden


@pytest.mark.slow
def test_dropping_hidden_patches_saves_two_fifths_of_the_arithmetic():
    """Compares the FLOPs of m1_max_quick_val with a context encoder that computes all patches.

    Both networks have only a few of their blocks, because tracing takes seconds. With all blocks,
    the saving is larger.
    """
    config, flops = load("m1_max_quick_val"), []
    with config.unlocked():
        config.model.depth, config.model.predictor_depth = 3, 1
    for num_context in (None, 196):
        with config.unlocked():
            config.mask.num_context = num_context
        program = run.build_run(config, CIFAR10).lower(steps_per_call=1, donate=False)
        flops.append(program.cost_analysis()["flops"])
    assert flops[0] / flops[1] == pytest.approx(0.6, abs=0.01)


@pytest.mark.slow
def test_a_term_of_weight_0_costs_nothing(tiny_config):
    """If all level weights are 0: no target pass, no predictor, and no gradient of either."""
    agree = {"loss.agreement_weight": 1.0, "data.local_views": 1, "data.local_size": 8}
    agree |= {"loss.regularizer": "none", "model.projection": (16, 8)}
    without = agree | {"loss.level_weights": (0.0, 0.0)}
    trained, flops = [], []
    for overrides in (agree, without, without | {"loss.teacher_weight": 1.0}):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(overrides)
        built = run.build_run(config, SMALL)
        trained.append(set(jax.eval_shape(built.create)[0].params))
        if overrides != agree:
            program = built.lower(steps_per_call=1, donate=False)
            flops.append(program.cost_analysis()["flops"])
    assert trained[0] == {"context_encoder", "predictor", "projection"}
    assert trained[1] == {"context_encoder", "projection"}

    model = build.build_model(tiny_config)
    images = jax.ShapeDtypeStruct((16, 16, 16, 3), "float32")
    encoder = jax.eval_shape(model.context_encoder.init, jax.random.PRNGKey(0), images)
    encode = jax.jit(model.context_encoder.apply)
    target_pass = encode.lower(encoder, images).cost_analysis()["flops"]
    assert flops[1] - flops[0] > target_pass  # the teacher term also needs a projection


@pytest.mark.slow
def test_gradient_accumulation_does_not_change_the_flops(tiny_config, monkeypatch):
    monkeypatch.setattr(run, "build_run", programs.sharing_runs(run.build_run))
    flops = []
    for num_parts in (1, 4):
        tiny_config.optim.accumulation_steps = num_parts
        flops.append(run.describe(tiny_config)["flops_per_image"])
    assert flops[0] == flops[1]


def test_every_field_has_a_reader():
    """An option that no code reads has no effect. A validation rule does not count as a reader."""
    files = pathlib.Path("hjepa_jax").rglob("*.py")
    texts = [p.read_text() for p in files if p.name not in {"defaults.py", "validation.py"}]
    package = "".join(texts) + inspect.getsource(config_module.encoder_size)
    fields = flatten(base_config().to_dict())
    assert not [field for field in fields if f".{field.split('.')[-1]}" not in package]


# A non-default value for each field of the model, the masks, the loss and the augmentation.
OTHER_VALUES = {
    "data": {
        "image_size": 64, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_scale": (0.3, 1.0),
        "crop_ratio": (1.0, 1.0), "stored_area": 1.0, "local_views": 2, "local_size": 8,
        "local_patches": 3, "local_crop_scale": (0.2, 0.4), "horizontal_flip": 0.3,
        "vertical_flip": 0.3, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.3,
        "solarize": 0.3, "jitter_probability": 0.3, "grayscale": 0.3, "blur": 0.3,
        "blur_sigma": (0.5, 1.0),
    },
    "model": {
        "name": "vit_small", "width": 96, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0,
        "patch_size": 8, "stem": "hmlp", "num_levels": 1, "num_summary_tokens": 2,
        "num_registers": 2, "positions": "rope2d", "layer_scale": 0.1, "gelu": "erf",
        "layer_norm_epsilon": 0.1, "drop_path": 0.1, "remat": True, "dtype": "bfloat16",
        "predictor_width": 48, "predictor_depth": 1, "predictor_num_heads": 2,
        "predictor_mode": "cross", "pyramid": "add", "projection": (64, 32),
        "projection_input": "summary+patches",
    },
    "mask": {
        "kind": "random", "num_blocks": 2, "scale": (0.1, 0.25), "progression": ("linear", 1.2),
        "aspect_ratio": (0.5, 2.0), "context_scale": (0.9, 1.0), "align_level": 0,
        "context_aspect_ratio": (1.0, 1.0), "num_context": 12, "min_coverage": 0.5,
    },
    "loss": {
        "kind": "mse", "level_weights": (1.0, 0.5), "summary_weight": 0.5, "agreement_weight": 2.0,
        "spread_weight": 0.1, "teacher_weight": 1.0, "spread_moment": "views", "num_slices": 8,
        "regularizer": "sigreg", "regularizer_weight": 0.1, "variance_weight": 5.0,
        "covariance_weight": 5.0, "regularized": "both",
    },
}  # fmt: skip
# Other settings that a field needs before it changes anything.
A_VIEW, AN_AGREEMENT = {"data.local_views": 1}, {"loss.agreement_weight": 1.0}
NEEDS = {
    "local_size": A_VIEW, "local_crop_scale": A_VIEW, "local_patches": A_VIEW,
    "spread_weight": AN_AGREEMENT, "projection": AN_AGREEMENT,
    "progression": {"mask.kind": "hierarchical"},
}  # fmt: skip
# Fields of the same groups that no builder reads: they select the data, or the train step reads
# them directly.
READ_ELSEWHERE = {
    "data.source", "data.dir", "data.streaming", "data.num_workers", "data.max_labelled",
    "data.train_split", "data.class_list", "data.follow_links", "model.target",
}  # fmt: skip
BUILDERS = (
    build.build_model, build.build_masks, build.build_augment, build.build_local_views,
    build.build_objective,
)  # fmt: skip


def test_every_option_changes_what_is_built():
    """Changes one field at a time. If `build` does not pass it on, no part changes."""
    parts = lambda *overrides: [part(changed(*overrides)) for part in BUILDERS]
    others = {f"{g}.{name}": v for g, values in OTHER_VALUES.items() for name, v in values.items()}
    fields = {f for f in flatten(base_config().to_dict()) if f.split(".")[0] in OTHER_VALUES}
    assert fields == others.keys() | READ_ELSEWHERE
    for field, value in others.items():
        needs = NEEDS.get(field.split(".")[1], {})
        assert parts(needs) == parts(needs)
        assert parts(needs) != parts(needs, {field: value}), field


BIG, NAN, INF = 10**18, float("nan"), float("inf")
BROKEN = {
    "platform": ["tpu9", None], "seed": [-1, True, None], "data.image_size": [30, 0, BIG],
    "data.streaming": ["sometimes"], "data.num_workers": [-1], "data.max_labelled": [0],
    "data.train_split": ["unlabelled"], "data.class_list": ["classes.txt"],
    "data.mean": [(), (0.1, 0.2, "a")], "data.std": [(0.5,), (0.5, 0.0, 0.5), (0.1, NAN, 0.1)],
    "data.crop_scale": [(0.5, 1.5), (0.9, 0.5), (0.9,), ((1, 2), 1)],
    "data.local_crop_scale": [(0.5, 0.2)], "data.horizontal_flip": [1.5, NAN],
    "data.vertical_flip": [-0.5], "data.blur": [1.5], "data.blur_sigma": [(0.0, 1.0)],
    "data.solarize": [2.0], "data.brightness": [-0.1], "data.hue": [0.6],
    "data.jitter_probability": [1.1],
    "data.local_views": [2, -1],  # 2: needs loss.agreement_weight
    "data.local_patches": [0, 0.0], "data.local_size": [1.5], "mask.num_context": [1.0, True],
    "model.name": ["vit_enormous"], "model.num_levels": [5, 0, 99_999],
    "model.positions": ["rope9d"], "model.dtype": ["float64"], "model.width": [190, BIG],
    "model.depth": [10**9], "model.mlp_ratio": [1e-9], "model.patch_size": [BIG],
    "model.predictor_width": [100], "model.num_summary_tokens": [-1], "model.num_registers": [-1],
    "model.layer_scale": [-0.1], "model.gelu": ["relu"], "model.layer_norm_epsilon": [0.0],
    "model.drop_path": [1.0], "model.predictor_mode": ["guess"], "model.pyramid": ["tower"],
    "model.target": ["teacher", "online"], "model.stem": ["conv"],
    "model.projection_input": ["pixels"],
    "model.projection": [(512,), (512, 0), (512, 1), (512, 2.5)], "mask.kind": ["stripes"],
    "mask.progression": [("geometric",), ("cubic", 1.5), ("linear", 0.5), ("linear", "a")],
    "mask.scale": [(0.0, 0.2), ("a", "b"), (0.1, INF)], "mask.num_blocks": [0, 10**9],
    "mask.align_level": [4, 10**9], "mask.min_coverage": [0.0], "loss.kind": ["l3"],
    "loss.level_weights": [(1.0,), (1.0, -1.0), ("a", "b"), (1, (2, 3)), (NAN, 1.0)],
    "loss.regularizer": ["hope"], "loss.num_slices": [0], "loss.summary_weight": [-1.0],
    "loss.agreement_weight": [1.0, -1.0],  # 1: needs a second view
    "loss.spread_weight": [-1.0],
    "loss.teacher_weight": [1.0, -1.0],  # 1: needs loss.agreement_weight
    "loss.spread_moment": ["epoch"], "optim.kind": ["sgd"], "optim.learning_rate": [INF, 1e30],
    "optim.decay_epochs": [-1.0], "optim.b1": [1.0, NAN], "optim.muon_momentum": [1.0],
    "optim.ema_momentum": [
        (0.9, 1.0, "sine"), (0.9, 1.1, "cosine"), (0.9, 1.0, 1.0), (NAN, 1.0, "cosine"),
    ],
    "optim.accumulation_steps": [3], "train.batch_size": [0, 2**40], "train.num_steps": [0, 2**31],
    "train.steps_per_call": [10**9], "log.every_steps": [0], "log.figures_every_epochs": [-1.0],
    "eval.num_val": [0], "eval.batch_size": [10**9], "parallel.cpu_devices": [10**9],
    "parallel.fsdp": [0],
}  # fmt: skip


@pytest.mark.parametrize("field", BROKEN)
def test_a_broken_rule_is_named(field):
    for value in BROKEN[field]:
        with pytest.raises(InputError) as error:
            validate(changed({field: value}))
        assert error.value.field == field
        assert repr(value) in str(error.value)


AGREE = {"loss.agreement_weight": 1.0, "data.local_views": 1, "loss.regularizer": "none"}
ONLINE = {"model.target": "online", "loss.regularizer": "sigreg", "loss.regularized": "both"}
CONTEXT = ONLINE | {"loss.regularized": "context"}
LIST = {"data.streaming": "always", "data.class_list": "a.txt"}
REGULARIZERS = ("vicreg", "sigreg")
NO_TERM = {"loss.level_weights": (0.0, 0.0)}
NO_TOKENS = {"model.num_summary_tokens": 0, "loss.regularized": "context"}
NO_WEIGHT = {"loss.regularizer": "none", "loss.regularizer_weight": 0.0}
NO_WEIGHTS = {
    "loss.regularizer": "none",
    "loss.variance_weight": 0.0,
    "loss.covariance_weight": 0.0,
}
# Each row: fields that fit together, a change that violates a rule between fields, and the start
# of the error.
RELATIONS = [
    ({"model.num_levels": 1}, {"model.pyramid": "add"}, "model.pyramid='add': needs model.num_le"),
    (ONLINE, {"model.pyramid": "add"}, "model.pyramid='add': needs model.target='ema'"),
    (NO_WEIGHT, {"loss.regularizer": "vicreg"}, "loss.regularizer='vicreg': must be none where"),
    (NO_WEIGHT, {"loss.regularizer": "sigreg"}, "loss.regularizer='sigreg': must be none where"),
    (NO_WEIGHTS, {"loss.regularizer": "vicreg"}, "loss.regularizer='vicreg': must be none where"),
    (NO_TERM, {"loss.regularizer": "none"}, "loss.level_weights=(0.0, 0.0): leaves the loss wit"),
    (AGREE, {"loss.spread_weight": 0.0}, "loss.spread_weight=0.0: must be greater than 0 where"),
    (AGREE, {"data.local_patches": 17}, "data.local_patches=17: must be from 1 to 16"),
    (AGREE, {"train.batch_size": 1}, "train.batch_size=1: must leave at least 2 images per part, "
     "which loss.agreement_weight=1.0 compares"),
    *((AGREE, {"data.local_size": size}, f"data.local_size={size}: must be 1 to 128 patches of "
       "model.patch_size=4") for size in (18, 0, -4, 516)),
    *(({"loss.regularizer": kind}, {"train.batch_size": 1}, "train.batch_size=1: must leave at "
       f"least 2 images per part, which loss.regularizer='{kind}") for kind in REGULARIZERS),
    (CONTEXT, {"loss.regularized": "summary"}, "model.target='online': needs loss.regularizer"),
    (CONTEXT, {"loss.regularizer_weight": 0.0}, "model.target='online': needs loss.regularizer"),
    ({"model.positions": "rope2d"}, {"model.width": 180, "model.num_heads": 6},
     "model.width=180: must be a multiple of 4 times 6 heads"),
    (LIST, {"data.train_split": "x"}, "data.class_list='a.txt': needs the split train, data.t"),
    (NO_TOKENS | {"loss.summary_weight": 0.0}, {"loss.summary_weight": 1.0},
     "loss.summary_weight=1.0: needs model.num_summary_tokens"),
    (NO_TOKENS | {"loss.summary_weight": 0.0}, {"loss.regularized": "summary"},
     "loss.regularized='summary': needs model.num_summary_tokens"),
    # Python refuses to print this number, but the error still has one line.
    ({}, {"mask.scale": (1 << 99_999, 1.0)}, "mask.scale=<tuple>: must be a tuple of numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("fitting", "change", "refusal"), RELATIONS, ids=range(len(RELATIONS)))
def test_fields_that_do_not_fit_each_other_are_refused(fitting, change, refusal):
    validate(changed(fitting))
    with pytest.raises(InputError) as error:
        validate(changed(fitting, change))
    assert str(error.value).startswith(refusal)


def test_a_section_that_lost_its_fields_is_refused():
    """`--config.optim={}` replaces a whole section."""
    config = base_config()
    config.optim = {"learning_rate": 1.0}
    with pytest.raises(InputError, match=r"optim.accumulation_steps=None: is missing"):
        validate(config)


def test_the_ema_has_the_kind_of_the_config():
    sizes = {"train.batch_size": 10, "train.num_steps": 11}
    for kind, expected in (("linear", [0.9, 0.9 + 0.1 * 5 / 11, 1.0]), ("constant", [0.9] * 3)):
        config = changed(sizes, {"optim.ema_momentum": (0.9, 1.0, kind)})
        momentum = build.build_schedules(config, 100).ema_momentum_fn
        assert [float(momentum(step)) for step in (0, 5, 11)] == pytest.approx(expected)


@pytest.mark.parametrize("field", ["train.num_epochs", "optim.warmup_epochs", "optim.decay_epochs"])
def test_epochs_of_more_steps_than_can_be_counted_are_refused(field):
    config = changed({field: 2e9})
    validate(config)
    with pytest.raises(InputError, match=rf"{field}=2000000000.0: must be at most 2147483647 step"):
        build.build_schedules(config, 50_000)


@pytest.mark.parametrize(
    ("change", "source", "rule"),
    [
        ({"train.batch_size": 50_001}, CIFAR10, r"^train.batch_size=50001.*50000"),
        ({"mask.scale": (0.001, 0.002)}, CIFAR10, r"^mask.scale=\(0.001, 0.002\): no block"),
        ({}, HUGE, r"^data.source.*GiB"),  # larger than the memory of the device
    ],
)
def test_a_run_that_its_data_does_not_allow_is_refused(change, source, rule):
    config = load("cifar10_tiny")
    config.update_from_flattened_dict(change)
    with pytest.raises(InputError, match=rule):
        run.build_run(config, source)


def edited(group="", **fields) -> str:
    config = base_config().to_dict()
    (config[group] if group else config).update(fields)
    return json.dumps(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "not an object"),
        ("[" * 99_999, "recursion"),
        (edited(colour="red"), "unknown colour"),
        (edited("model", teacher={"width": 3}), "unknown model.teacher.width"),
        (edited("model", expander_width=8), "unknown model.expander_width"),
        (edited("mask", num_masks=2), "unknown mask.num_masks"),
        (edited(model=3), "unknown model"),
        (edited(seed="a"), "seed"),
        (edited(seed=None), "seed=None"),
        (edited("mask", scale=[{"a": 1}, [2]]), "mask.scale"),
        (edited("optim", learning_rate=NAN), "optim.learning_rate"),
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
    saved["model"].pop("num_registers")  # as saved by a version without the field
    for field, value in REMOVED_FIELDS.items():
        group, name = field.split(".")
        saved[group][name] = value
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert differing_fields(load_config(tmp_path), config) == []


def test_a_workdir_that_cannot_be_looked_at_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    for name, rule in (("x" * 300, "File name too long"), ("none", "no run"), ("file", "no run")):
        with pytest.raises(InputError, match=rule):
            load_config(tmp_path / name)


def test_only_fields_that_matter_count_as_another_config():
    free = {"log.every_steps": 7, "train.steps_per_call": 5, "data.dir": "x", "data.num_workers": 9}
    for change, found in (
        ({}, []),
        ({"mask.scale": (0.1, 0.2), "seed": 3}, ["mask.scale", "seed"]),
    ):
        new = changed(free, change)
        assert differing_fields(base_config(), new) == found


def sizes_of(config):
    local = build.build_local_views(config)
    return build.build_masks(config).context_capacity, local.num_patches, local.augment.image_size


def test_sizes_given_as_fractions_scale_with_the_image():
    config = load("cifar10_tiny")
    assert sizes_of(config) == (16, 16, (32, 32))
    counted = load("cifar10_tiny").unlock()
    counted.mask.num_context, counted.data.local_patches, counted.data.local_size = 16, 16, 32
    assert sizes_of(counted) == (16, 16, (32, 32))
    assert differing_fields(config, counted) == []  # both describe the same run
    for c in (config, counted):
        c.data.image_size = 64
    assert sizes_of(config) == (64, 64, (64, 64))
    assert sizes_of(counted) == (16, 16, (32, 32))
    changed = ["data.local_patches", "data.local_size", "mask.num_context"]
    assert differing_fields(config, counted) == changed
    config.data.local_size = 0.3  # 4.8 of 16 patches of 4 pixels
    assert sizes_of(config) == (64, 6, (20, 20))


@pytest.mark.slow
def test_a_small_context_and_a_large_step_are_warned_of(tiny_config, monkeypatch, capsys):
    run.describe(tiny_config)
    assert "warning" not in capsys.readouterr().err
    tiny_config.mask.num_context = 1
    monkeypatch.setattr("hjepa_jax.runs.limits.device_bytes", lambda device: 2**19)
    assert run.describe(tiny_config)["step_bytes"] > 2**19
    few, large = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning"))
    assert few.startswith("warning: mask.num_context shows the encoder 1 of the 16 patches of an")
    assert large.startswith("warning: a step needs 0.0 GiB by XLA's estimate, and each cpu device")
    assert "train.batch_size=16" in large


@pytest.mark.parametrize("kind", ["hierarchical", "random"])
def test_every_kind_of_mask_is_built_shown_and_trained_with(kind, tiny_config):
    tiny_config.mask.kind, tiny_config.loss.regularizer = kind, "sigreg"
    tiny_config.mask.progression = ("geometric", 1.0)  # so that level 1 fits the 4 x 4 patches
    built = run.build_run(tiny_config, SMALL)
    state, window = jax.eval_shape(built.create)
    assert "loss_sigreg" in window.averages.__annotations__
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), "uint8")
    snapshot = build_snapshot_fn(tiny_config, built.model)
    shown = jax.eval_shape(snapshot, state.params, state.target_params, images)
    assert shown.states[0].shape == (2, 4, 4)
