"""The rules of a config, checked before any data is read or the backend starts.

`_FIELDS` has the rules of single fields. The functions below it yield the rules between fields. A
new field needs at least an entry in the table.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hjepa_jax.config.defaults import AUTO, SIZES, Config, base_config, encoder_size
from hjepa_jax.config.fields import check_types, get_field, is_a
from hjepa_jax.config.sizes import grid_of, local_sides, num_local_patches
from hjepa_jax.data.pixels import MAX_CHANNELS
from hjepa_jax.data.sides import pair
from hjepa_jax.errors import InputError
from hjepa_jax.method.losses import PREDICTION_LOSSES
from hjepa_jax.method.objective import SPREAD_MOMENTS
from hjepa_jax.models.hjepa import PROJECTION_INPUTS, REGULARIZED
from hjepa_jax.models.positions import POSITIONS
from hjepa_jax.models.predictor import MODES
from hjepa_jax.models.pyramid import FUSIONS
from hjepa_jax.models.stem import STEMS
from hjepa_jax.models.transformer import GELUS
from hjepa_jax.runtime.backend import PLATFORMS

MAX_SIDE = 128  # patches


class Rule(NamedTuple):
    """A condition on the value of a field, and its text for error messages."""

    holds: Callable[[Any], bool]
    words: str


# Field, whether it satisfies a rule, and the text of the rule.
Relations = Iterator[tuple[str, bool, str]]


def validate(config: Config) -> None:
    """Checks each field by itself and against the others.

    Raises:
      InputError: naming the first field that breaks a rule, its value and the rule.
    """
    check_types(config, base_config())
    for rule, fields in _FIELDS:
        for field in fields.split():
            value = get_field(config, field)
            if value is not None and not rule.holds(value):  # `check_types` decides about None
                raise InputError(field, value, rule.words)
    for relations in (_data_relations, _model_relations, _mask_relations, _loss_relations):
        for field, holds, words in relations(config):
            if not holds:
                raise InputError(field, get_field(config, field), words)


def _one_of(*options: str) -> Rule:
    return Rule(lambda value: value in options, f"must be one of {', '.join(options)}")


def _at_least(low: float, at_most: float = math.inf) -> Rule:
    words = f"must be at least {low:g}"
    words += f" and at most {at_most}" if at_most < math.inf else ""
    return Rule(lambda value: low <= value <= at_most, words)


def _increasing(low: float, high: float) -> Rule:
    words = f"must be two numbers with {low:g} < first <= second <= {high:g}"
    return Rule(lambda v: _numbers(v, 2) and low < v[0] <= v[1] <= high, words)


def _per_channel(value: tuple[Any, ...]) -> bool:
    return _numbers(value, len(value)) and 1 <= len(value) <= MAX_CHANNELS


def _numbers(value: tuple[Any, ...], count: int) -> bool:
    return len(value) == count and all(is_a(float, v) for v in value)


_FRACTION = Rule(lambda v: 0 <= v <= 1, "must be in [0, 1]")
_BELOW_ONE = Rule(lambda v: 0 <= v < 1, "must be in [0, 1)")
_POSITIVE = Rule(lambda v: v > 0, "must be greater than 0")
_PIXELS = "must be at least 1 and at most 4096 pixels"
_CHANNELS = f"one number per channel, 1 to {MAX_CHANNELS} of them, or auto"
_STD = f"must be {_CHANNELS}, each greater than 0"
_PROJECTION = "must be two whole numbers, hidden width and features, from 2 to 8192"
_PROGRESSION = "must be (geometric | linear, factor), with a factor of 1 to 100"
_EMA = "must be (start, end, constant | linear | cosine), start and end in [0, 1]"


def _is_progression(v: tuple[Any, ...]) -> bool:
    known = len(v) == 2 and v[0] in ("geometric", "linear")
    return known and is_a(float, v[1]) and 1 <= v[1] <= 100


def _is_ema(v: tuple[Any, ...]) -> bool:
    known = len(v) == 3 and v[2] in ("constant", "linear", "cosine")
    return known and all(is_a(float, m) and 0 <= m <= 1 for m in v[:2])


def _are_sizes(v: tuple[Any, ...]) -> bool:
    return len(v) == 2 and all(is_a(int, n) and 2 <= n <= 8192 for n in v)


# Rules, and the fields that each applies to. The upper limits of sizes are far above practical
# values, but below sizes that would fill the memory.
_FIELDS: tuple[tuple[Rule, str], ...] = (
    (_one_of(*PLATFORMS), "platform"),
    (_one_of("auto", "always", "never"), "data.streaming"),
    (_at_least(0, at_most=1024), "data.num_workers"),
    (Rule(lambda v: all(1 <= s <= 4096 for s in pair(v)), _PIXELS), "data.image_size"),
    (Rule(lambda v: v == AUTO or _per_channel(v), f"must be {_CHANNELS}"), "data.mean"),
    (Rule(lambda v: v == AUTO or (_per_channel(v) and min(v) > 0), _STD), "data.std"),
    (_increasing(0, 1), "data.crop_scale data.local_crop_scale mask.scale mask.context_scale"),
    (_increasing(0, 100), "data.crop_ratio data.blur_sigma"),
    (_increasing(0, 100), "mask.aspect_ratio mask.context_aspect_ratio"),
    (_at_least(0, at_most=64), "data.local_views"),
    (_at_least(1, at_most=64), "data.stored_area"),
    (_FRACTION, "data.horizontal_flip data.vertical_flip data.grayscale data.blur data.solarize"),
    (_FRACTION, "data.brightness data.contrast data.saturation data.jitter_probability"),
    (Rule(lambda v: 0 <= v <= 0.5, "must be in [0, 0.5]"), "data.hue"),
    (_one_of(*SIZES), "model.name"),
    (_one_of(*POSITIONS), "model.positions"),
    (_one_of("float32", "bfloat16"), "model.dtype"),
    (_at_least(1, at_most=8192), "model.width model.predictor_width model.patch_size"),
    (_at_least(1, at_most=256), "model.depth model.predictor_depth"),
    (_at_least(1, at_most=256), "model.num_heads model.predictor_num_heads"),
    (_at_least(0.25, at_most=64), "model.mlp_ratio"),  # 0.25: one hidden unit at a width of 4
    (_at_least(1, at_most=16), "model.num_levels"),
    (_at_least(0, at_most=1024), "model.num_summary_tokens model.num_registers"),
    (_at_least(0, at_most=100), "model.layer_scale"),
    (_BELOW_ONE, "model.drop_path optim.b1 optim.b2 optim.muon_momentum"),
    (_one_of(*MODES), "model.predictor_mode"),
    (_one_of(*STEMS), "model.stem"),
    (_one_of(*GELUS), "model.gelu"),
    (_one_of(*PROJECTION_INPUTS), "model.projection_input"),
    (_one_of("none", *FUSIONS), "model.pyramid"),
    (_one_of("ema", "online"), "model.target"),
    (Rule(_are_sizes, _PROJECTION), "model.projection"),
    (_one_of("multiblock", "hierarchical", "random"), "mask.kind"),
    (Rule(_is_progression, _PROGRESSION), "mask.progression"),
    (_at_least(1, at_most=256), "mask.num_blocks parallel.cpu_devices"),
    (Rule(lambda v: 0 < v <= 1, "must be in (0, 1]"), "mask.min_coverage model.layer_norm_epsilon"),
    (_at_least(0, at_most=16), "mask.align_level"),
    (_one_of(*PREDICTION_LOSSES), "loss.kind"),
    (_one_of("vicreg", "sigreg", "none"), "loss.regularizer"),
    (_one_of(*REGULARIZED), "loss.regularized"),
    (_one_of(*SPREAD_MOMENTS), "loss.spread_moment"),
    (_at_least(0), "loss.summary_weight loss.regularizer_weight loss.variance_weight"),
    (_at_least(0), "loss.covariance_weight loss.agreement_weight loss.spread_weight"),
    (_at_least(0), "loss.teacher_weight"),
    (_at_least(1, at_most=65_536), "loss.num_slices eval.batch_size"),
    (_at_least(0), "optim.learning_rate optim.final_learning_rate optim.warmup_epochs"),
    (_at_least(0), "optim.decay_epochs optim.weight_decay optim.final_weight_decay"),
    (_at_least(0), "seed optim.clip_norm train.max_nonfinite_steps"),
    (_at_least(0), "eval.every_epochs log.figures_every_epochs"),
    (_one_of("adamw", "muon"), "optim.kind"),
    (Rule(_is_ema, _EMA), "optim.ema_momentum"),
    (_at_least(1, at_most=2**20), "optim.accumulation_steps train.batch_size"),
    # The rows of all batches of a call are made at once.
    (
        _at_least(1, at_most=10_000),
        "train.steps_per_call",
    ),
    (_POSITIVE, "train.num_epochs train.num_steps train.keep_checkpoints"),
    (_POSITIVE, "train.checkpoint_every_epochs train.checkpoint_every_steps"),
    (_POSITIVE, "mask.num_context eval.knn_bank_size eval.num_val log.every_steps"),
    (_one_of("warn", "stop", "ignore"), "train.on_collapse"),
    # runs.run also checks that parallel.fsdp divides the number of devices.
    (_at_least(1), "data.max_labelled parallel.fsdp"),
)


def _agrees(c: Config) -> bool:
    """Whether the loss compares the projections of views."""
    return c.loss.agreement_weight > 0


def _regularizes(c: Config) -> bool:
    """Whether the regularizer has a term."""
    of_terms = {"vicreg": c.loss.variance_weight + c.loss.covariance_weight, "none": 0.0}
    return c.loss.regularizer_weight * of_terms.get(c.loss.regularizer, 1.0) > 0


def _predicts(c: Config) -> bool:
    """Whether any level is predicted."""
    return c.loss.level_weights is None or any(c.loss.level_weights)


def _data_relations(c: Config) -> Relations:
    same = AUTO in (c.data.mean, c.data.std) or len(c.data.std) == len(c.data.mean)
    yield "data.std", same, f"must have as many numbers as data.mean, {len(c.data.mean)}"
    streamed = c.data.streaming == "always"
    for name in ("train_split", "class_list"):
        yield f"data.{name}", c.data[name] is None or streamed, "needs data.streaming='always'"
    alone = c.data.class_list is None or c.data.train_split is None
    yield "data.class_list", alone, "needs the split train, data.train_split=None"
    words = f"must be a multiple of model.patch_size={c.model.patch_size}"
    whole = all(side % c.model.patch_size == 0 for side in pair(c.data.image_size))
    yield "data.image_size", whole, words
    patch_size, (height, width) = c.model.patch_size, local_sides(c)
    fits = all(s % patch_size == 0 and 1 <= s // patch_size <= MAX_SIDE for s in (height, width))
    words = f"must be 1 to {MAX_SIDE} patches of model.patch_size={c.model.patch_size} pixels"
    yield "data.local_size", fits or not c.data.local_views, words
    shown, total = num_local_patches(c), height * width // patch_size**2
    words = f"must be from 1 to {total}, the patches of data.local_size={c.data.local_size}"
    yield "data.local_patches", shown is None or 1 <= shown <= total, words
    words = "needs loss.agreement_weight above 0: only the agreement reads local views"
    yield "data.local_views", _agrees(c) or not c.data.local_views, words


def _model_relations(c: Config) -> Relations:
    width, _, heads = encoder_size(c)
    predictor = (c.model.predictor_width, c.model.predictor_num_heads)
    for field, w, h in (("model.width", width, heads), ("model.predictor_width", *predictor)):
        words = f"must be a multiple of the number of heads, {h}, and of 4, for the positions"
        yield field, w % h == 0 and w % 4 == 0, words
        words = f"must be a multiple of 4 times {h} heads, for model.positions='rope2d'"
        yield field, c.model.positions != "rope2d" or w // h % 4 == 0, words
    (rows, cols), top = grid_of(c), 2 ** (c.model.num_levels - 1)
    words = f"must leave at most {MAX_SIDE} patches per side"
    yield "model.patch_size", max(rows, cols) <= MAX_SIDE, words
    words = f"cells of the top level, {top} patches wide, must fit the {rows}x{cols} grid"
    yield "model.num_levels", top <= min(rows, cols), words
    linear = c.model.stem == "linear"
    yield (
        "model.stem",
        linear or c.model.patch_size % 4 == 0,
        "needs a model.patch_size that 4 divides",
    )
    plain = c.model.pyramid == "none"
    yield "model.pyramid", plain or c.model.num_levels > 1, "needs model.num_levels of at least 2"
    # If the targets had a gradient, the pyramid could learn to make all targets the same.
    yield "model.pyramid", plain or c.model.target == "ema", "needs model.target='ema'"
    held = c.loss.regularizer == "sigreg" and _regularizes(c) and c.loss.regularized != "summary"
    words = "needs loss.regularizer='sigreg' of the patches (loss.regularized: context or both)"
    yield "model.target", c.model.target == "ema" or held, words


def _mask_relations(c: Config) -> Relations:
    rows, cols = grid_of(c)
    words = f"must be a level whose cells fit the {rows}x{cols} grid"
    yield "mask.align_level", 2 ** (c.mask.align_level or 0) <= min(rows, cols), words


def _loss_relations(c: Config) -> Relations:
    weights, num_levels = c.loss.level_weights, c.model.num_levels
    known = weights is None or (_numbers(weights, num_levels) and min(weights) >= 0)
    yield "loss.level_weights", known, f"must be {num_levels} numbers >= 0, one per level"
    words = "must be none where loss.regularizer_weight, or both weights of vicreg, are 0"
    yield "loss.regularizer", _regularizes(c) or c.loss.regularizer == "none", words
    words = "leaves the loss without any term: weight a level, agreement_weight or a regularizer"
    yield "loss.level_weights", _predicts(c) or _regularizes(c) or _agrees(c), words
    plain = c.model.pyramid == "none"
    yield "model.pyramid", plain or _predicts(c), "needs a weight in loss.level_weights"

    some = c.model.num_summary_tokens > 0
    words = "needs model.num_summary_tokens of at least 1"
    yield "loss.summary_weight", some or c.loss.summary_weight == 0, words
    unused = c.loss.regularizer == "none" or c.loss.regularized == "context"
    yield "loss.regularized", some or unused, words
    yield "loss.agreement_weight", some or not _agrees(c), words
    words = "needs data.local_views of at least 1, to agree with the view that is masked"
    yield "loss.agreement_weight", c.data.local_views > 0 or not _agrees(c), words
    known = c.loss.teacher_weight == 0 or (_agrees(c) and c.model.target == "ema")
    words = "needs loss.agreement_weight above 0, and model.target='ema'"
    yield "loss.teacher_weight", known, words
    words = "must be greater than 0 where loss.agreement_weight is: all images would be alike"
    yield "loss.spread_weight", c.loss.spread_weight > 0 or not _agrees(c), words

    batch_size, num_parts = c.train.batch_size, c.optim.accumulation_steps
    words = f"must divide train.batch_size={batch_size}"
    yield "optim.accumulation_steps", batch_size % num_parts == 0, words
    compares = "loss.agreement_weight" if _agrees(c) else "loss.regularizer"
    words = f"must leave at least 2 images per part, which {compares}={get_field(c, compares)!r} "
    each_alone = not _agrees(c) and c.loss.regularizer == "none"
    yield "train.batch_size", each_alone or batch_size // num_parts >= 2, words + "compares"
