"""Every field of a config, with its default, meaning and unit; and the check of all of them.

A file in configs/ starts from `base_config()`, changes what it is about, and returns a locked
ConfigDict, so that a misspelt override is refused. Durations end in `_steps` or `_epochs`; where
both exist, None leaves the choice to the other.
"""

import math
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from hjepa_jax.errors import InputError
from hjepa_jax.fields import check_types, flatten, get_field, is_a
from hjepa_jax.losses import PREDICTION_LOSSES
from hjepa_jax.models.hjepa import REGULARIZED
from hjepa_jax.models.positions import POSITIONS
from hjepa_jax.models.predictor import MODES
from hjepa_jax.models.pyramid import FUSIONS
from hjepa_jax.models.vit import SIZES

# An ml_collections.ConfigDict, whose fields no type checker knows.
Config = Any

# Fields that may differ between a run and its continuation: they change what is said about the
# run, how fast it goes or where its data lies, not what it computes.
FREE_FIELDS = (
    "data.dir",
    "data.num_workers",
    "eval.",
    "log.",
    "model.remat",
    "parallel.",
    "platform",
    "train.checkpoint_every_epochs",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.max_nonfinite_steps",
    "train.on_collapse",
    "train.steps_per_call",
)

# Fields that came later than others. A run without them did what their defaults do, so that its
# config.json may lack them.
ADDED_FIELDS = (
    "data.local_crop_scale",
    "data.local_size",
    "data.local_views",
    "loss.cross_view",
    "loss.local_weight",
    "model.drop_path",
    "model.global_level",
    "model.layer_scale",
    "model.level_depths",
    "model.num_registers",
    "model.predictor_mode",
    "model.pyramid",
    "model.target",
    "model.target_layers",
    "train.init_from",
)


def base_config() -> Config:
    """The defaults. Values that experiments chose are in configs/, not here."""
    c = ConfigDict()
    c.seed = 0  # of parameters, masks, augmentation and data order
    c.platform = "auto"  # auto | cpu | cuda | metal | mps

    c.data = ConfigDict()
    c.data.source = "tfds:cifar10"  # tfds:<name> | shapes | npz:<file> | folder:<directory>
    c.data.dir = placeholder(str)  # where TFDS keeps prepared sets; None: TFDS_DATA_DIR or ~
    c.data.streaming = "auto"  # always | never | auto: where decoded images are more than 8 GiB
    c.data.num_workers = 2  # processes that decode streamed images; 0: a thread of the run
    c.data.max_labelled = 20_000  # of a streamed set: images per split kept in memory for probes
    c.data.train_split = placeholder(str)  # of a streamed TFDS set, may lack labels; None: train
    c.data.class_list = placeholder(str)  # a file: a streamed TFDS set has only the classes in it
    c.data.image_size = 32  # pixels per side that the model sees; stored images are resized
    c.data.mean = (0.491, 0.482, 0.447)  # per channel, of pixels in [0, 1]
    c.data.std = (0.247, 0.243, 0.262)
    c.data.crop_scale = (0.6, 1.0)  # area of the random crop, fraction of the image
    c.data.crop_ratio = (0.75, 1.3333)  # its width / height
    c.data.local_views = 0  # V, small crops of each image, from which the global level is predicted
    c.data.local_size = 16  # pixels per side of such a crop, as the model sees it
    c.data.local_crop_scale = (0.1, 0.4)  # its area, fraction of the image
    c.data.horizontal_flip = 0.5  # probability
    c.data.vertical_flip = 0.0  # probability
    c.data.brightness = 0.2  # factor uniform in [1 - s, 1 + s]
    c.data.contrast = 0.2
    c.data.saturation = 0.2
    c.data.grayscale = 0.0  # probability
    c.data.blur = 0.0  # probability of a Gaussian blur
    c.data.blur_sigma = (0.1, 2.0)  # its standard deviation, pixels
    c.data.solarize = 0.0  # probability of inverting the pixels of at least half brightness

    c.model = ConfigDict()
    c.model.name = "vit_tiny"  # sets width, depth and heads, where those are None
    c.model.width = placeholder(int)
    c.model.depth = placeholder(int)
    c.model.num_heads = placeholder(int)
    c.model.mlp_ratio = 4.0
    c.model.patch_size = 4  # pixels per side of a patch
    c.model.num_levels = 2  # L; level l has cells of 2^l x 2^l patches
    c.model.num_summary_tokens = 4  # R
    c.model.num_registers = 0  # further such tokens, that nobody reads
    c.model.positions = "learned"  # learned (from sine-cosine on) | sincos2d (fixed) | rope2d
    c.model.layer_scale = 0.0  # initial factor of each residual branch, per feature; 0: none
    c.model.drop_path = 0.0  # probability to leave out a branch of the last block (first: 0)
    c.model.remat = False  # compute blocks again in the backward pass: less memory, slower
    c.model.dtype = "float32"  # of matrix products: float32 | bfloat16; parameters are float32
    c.model.predictor_width = 96
    c.model.predictor_depth = 4
    c.model.predictor_num_heads = 3
    c.model.predictor_mode = "self"  # who attends: self (all) | blocks (each its own) | cross
    c.model.global_level = False  # one query more, for the mean of the whole image
    c.model.pyramid = "none"  # add | concat: levels inform those below them, on both sides
    c.model.target = "ema"  # ema | online: no EMA, gradients flow through both sides (sigreg)
    c.model.level_depths = placeholder(tuple)  # block whose output level l targets; None: the last
    c.model.target_layers = 1  # k, blocks of the target encoder, up to that one, that are averaged
    c.model.expander_width = 0  # of an MLP between encoder and regularizer; 0: none

    c.mask = ConfigDict()
    # What is hidden. multiblock: M blocks of whole cells of align_level; hierarchical: block m of
    # whole cells of level m mod L, larger by progression; random: scattered cells of align_level.
    c.mask.kind = "multiblock"
    c.mask.num_blocks = 4  # M, target blocks per image; random: always one set of cells
    c.mask.scale = (0.15, 0.25)  # area of a block (hierarchical: of level 0), or all of random's
    c.mask.progression = ("geometric", 1.5)  # hierarchical: geometric | linear, level 1 / level 0
    c.mask.aspect_ratio = (0.75, 1.5)  # height / width of a target block
    c.mask.context_scale = (0.85, 1.0)  # area of the context block, before targets are removed
    c.mask.context_aspect_ratio = (0.75, 1.5)
    c.mask.align_level = placeholder(int)  # targets are whole cells of this level; None: L - 1
    c.mask.num_context = placeholder(int)  # K, context tokens kept; None: the expected number
    c.mask.min_coverage = 1.0  # fraction of a cell that must be hidden for it to be a target

    c.loss = ConfigDict()
    c.loss.kind = "smooth_l1"  # smooth_l1 | mse | cosine
    c.loss.level_weights = placeholder(tuple)  # w_l, finest first; None: 1 each
    c.loss.summary_weight = 1.0  # of the pass that sees the summary tokens only; 0: no such pass
    c.loss.cross_view = 0.0  # share of the global loss whose target is a second augmentation
    c.loss.local_weight = 1.0  # of what local views (data.local_views) predict
    c.loss.regularizer = "vicreg"  # vicreg | sigreg (to a standard normal) | none
    c.loss.regularizer_weight = 0.05  # multiplies sigreg, or the two terms of vicreg
    c.loss.variance_weight = 25.0  # of vicreg
    c.loss.covariance_weight = 1.0  # of vicreg
    c.loss.num_slices = 256  # of sigreg: random directions, drawn anew in each step
    c.loss.regularized = "summary"  # summary (each token) | context (mean of visible tokens) | both

    c.optim = ConfigDict()
    c.optim.learning_rate = 1e-3  # peak
    c.optim.final_learning_rate = 0.0
    c.optim.warmup_epochs = 1.0
    c.optim.weight_decay = 0.05
    c.optim.final_weight_decay = placeholder(float)  # cosine towards it; None: constant
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.clip_norm = 3.0  # global gradient norm; 0: no clipping
    c.optim.ema_momentum = (0.98, 0.98, "constant")  # start, end, constant | linear | cosine
    c.optim.max_ema_momentum = 1.0  # where that schedule is above, this
    c.optim.accumulation_steps = 1  # parts of a batch whose gradients are averaged

    c.train = ConfigDict()
    c.train.batch_size = 256  # images per update, global
    c.train.num_epochs = 20.0
    c.train.num_steps = placeholder(int)  # wins over num_epochs
    c.train.init_from = placeholder(str)  # another run's workdir: start from its parameters
    c.train.steps_per_call = 1  # updates per dispatch to the device
    c.train.checkpoint_every_epochs = 1.0
    c.train.checkpoint_every_steps = placeholder(int)  # wins over checkpoint_every_epochs
    c.train.keep_checkpoints = 2  # newest kept, beside the best by k-NN
    c.train.max_nonfinite_steps = 10  # of a run: left out and counted; one more ends the run
    c.train.on_collapse = "warn"  # of the target features: warn | stop | ignore

    c.eval = ConfigDict()
    c.eval.every_epochs = 1.0  # k-NN on held-out training images; 0: never
    c.eval.knn_bank_size = 10_000  # training images that it compares with
    c.eval.num_val = 5_000  # training images held out from probes for choosing (fixed seed)
    c.eval.batch_size = 256
    c.eval.probe_at_end = True  # linear and k-NN on the test set after the last step

    c.parallel = ConfigDict()
    c.parallel.cpu_devices = 1  # devices that the CPU poses as; a batch is split over all devices
    c.parallel.fsdp = 1  # devices that share one copy of parameters, EMA and optimizer state

    c.log = ConfigDict()
    c.log.every_steps = 50
    c.log.tensorboard = True
    # Pictures of what the model sees, in TensorBoard: as far as 2 % of the time allows, and at the
    # end; 0: never.
    c.log.figures_every_epochs = 5.0
    c.log.report = True  # write report.md and report.html when the run ends
    return c


def validate(config: Config) -> None:
    """Checks each field by itself and against the others, without data or backend.

    Raises:
      InputError: naming the first field that breaks a rule, its value and the rule.
    """

    def check(condition: bool, field: str, rule: str) -> None:
        if not condition:
            raise InputError(field, get_field(config, field), rule)

    def one_of(field: str, options: tuple[str, ...]) -> None:
        check(get_field(config, field) in options, field, f"must be one of {', '.join(options)}")

    def at_least(low: float, *fields: str, at_most: float = math.inf) -> None:
        rule = f"must be at least {low:g}"
        rule += f" and at most {at_most}" if at_most < math.inf else ""
        for field in fields:
            value = get_field(config, field)
            check(value is None or low <= value <= at_most, field, rule)

    def positive(*fields: str) -> None:
        for field in fields:
            value = get_field(config, field)
            check(value is None or value > 0, field, "must be greater than 0")

    def fraction(*fields: str) -> None:
        for field in fields:
            check(0 <= get_field(config, field) <= 1, field, "must be in [0, 1]")

    def numbers(field: str, count: int, rule: str) -> None:
        value = get_field(config, field)
        check(len(value) == count and all(is_a(float, v) for v in value), field, rule)

    def increasing(field: str, low: float, high: float) -> None:
        rule = f"must be two numbers with {low:g} < first <= second <= {high:g}"
        numbers(field, 2, rule)
        first, second = get_field(config, field)
        check(low < first <= second <= high, field, rule)

    check_types(config, base_config())
    at_least(0, "seed")
    one_of("platform", ("auto", "cpu", "cuda", "metal", "mps"))

    one_of("data.streaming", ("auto", "always", "never"))
    at_least(0, "data.num_workers", at_most=1024)
    at_least(1, "data.max_labelled")
    for field in ("data.train_split", "data.class_list"):
        streamed = get_field(config, field) is None or config.data.streaming == "always"
        check(streamed, field, "needs data.streaming='always'")
    alone = config.data.class_list is None or config.data.train_split is None
    check(alone, "data.class_list", "needs the split train, data.train_split=None")

    # Sizes end far above any use, and before what they size would fill the memory.
    at_least(1, "data.image_size", at_most=4096)
    for field in ("data.mean", "data.std"):
        numbers(field, 3, "must be three numbers, one per channel")
    check(min(config.data.std) > 0, "data.std", "must be greater than 0")
    increasing("data.crop_scale", 0, 1)
    increasing("data.crop_ratio", 0, 100)
    at_least(0, "data.local_views", at_most=64)
    increasing("data.local_crop_scale", 0, 1)
    has_top = config.model.global_level and config.model.num_summary_tokens > 0
    rule = "needs model.global_level=True and model.num_summary_tokens of at least 1"
    check(has_top or not config.data.local_views, "data.local_views", rule)
    fraction("data.horizontal_flip", "data.vertical_flip")
    fraction("data.grayscale", "data.blur", "data.solarize")
    increasing("data.blur_sigma", 0, 100)
    fraction("data.brightness", "data.contrast", "data.saturation")

    one_of("model.name", tuple(SIZES))
    one_of("model.positions", POSITIONS)
    one_of("model.dtype", ("float32", "bfloat16"))
    at_least(1, "model.width", "model.predictor_width", "model.patch_size", at_most=8192)
    at_least(1, "model.depth", "model.predictor_depth", at_most=256)
    at_least(1, "model.num_heads", "model.predictor_num_heads", at_most=256)
    at_least(0.25, "model.mlp_ratio", at_most=64)  # of a width of at least 4: one unit
    at_least(1, "model.num_levels", at_most=16)
    at_least(0, "model.num_summary_tokens", at_most=1024)
    at_least(0, "model.num_registers", at_most=1024)
    at_least(0, "model.expander_width", at_most=65_536)
    at_least(0, "model.layer_scale", at_most=100)
    check(0 <= config.model.drop_path < 1, "model.drop_path", "must be in [0, 1)")
    one_of("model.predictor_mode", MODES)
    one_of("model.pyramid", ("none", *FUSIONS))
    stands = config.model.pyramid == "none" or config.model.num_levels > 1
    check(stands, "model.pyramid", "needs model.num_levels of at least 2")
    # Through targets with a gradient it could learn to make all of them the same.
    held = config.model.pyramid == "none" or config.model.target == "ema"
    check(held, "model.pyramid", "needs model.target='ema'")
    one_of("model.target", ("ema", "online"))
    width, depth, num_heads = encoder_size(config)
    levels, depths = config.model.num_levels, config.model.level_depths
    depths = (depth,) * levels if depths is None else depths
    rule = f"must be one block per level, {levels} whole numbers from 1 to {depth}"
    check(all(is_a(int, d) and 1 <= d <= depth for d in depths), "model.level_depths", rule)
    check(len(depths) == levels, "model.level_depths", rule)
    at_least(1, "model.target_layers", at_most=min(depths))
    head_rule = "must be a multiple of the number of heads, {}, and of 4, for the positions"
    for field, w, heads in (
        ("model.width", width, num_heads),
        ("model.predictor_width", config.model.predictor_width, config.model.predictor_num_heads),
    ):
        check(w % heads == 0 and w % 4 == 0, field, head_rule.format(heads))
        rotates = config.model.positions == "rope2d"
        rule = f"must be a multiple of 4 times {heads} heads, for model.positions='rope2d'"
        check(not rotates or w // heads % 4 == 0, field, rule)
    check(
        config.data.image_size % config.model.patch_size == 0,
        "data.image_size",
        f"must be a multiple of model.patch_size={config.model.patch_size}",
    )
    rule = f"must be 1 to 128 patches of model.patch_size={config.model.patch_size} pixels"
    side, rest = divmod(config.data.local_size, config.model.patch_size)
    fits = 1 <= side <= 128 and rest == 0
    check(fits or not config.data.local_views, "data.local_size", rule)
    grid_size = config.data.image_size // config.model.patch_size
    check(grid_size <= 128, "model.patch_size", "must leave at most 128 patches per side")
    check(
        2 ** (config.model.num_levels - 1) <= grid_size,
        "model.num_levels",
        f"cells of the top level, {2 ** (config.model.num_levels - 1)} patches wide, must fit the "
        f"{grid_size}x{grid_size} grid",
    )

    one_of("mask.kind", ("multiblock", "hierarchical", "random"))
    growth = config.mask.progression
    growth_rule = "must be (geometric | linear, factor), with a factor of 1 to 100"
    check(len(growth) == 2, "mask.progression", growth_rule)
    check(growth[0] in ("geometric", "linear"), "mask.progression", growth_rule)
    factor_fits = is_a(float, growth[1]) and 1 <= growth[1] <= 100
    check(factor_fits, "mask.progression", growth_rule)
    increasing("mask.scale", 0, 1)
    increasing("mask.context_scale", 0, 1)
    increasing("mask.aspect_ratio", 0, 100)
    increasing("mask.context_aspect_ratio", 0, 100)
    at_least(1, "mask.num_blocks", at_most=256)
    positive("mask.num_context")
    check(0 < config.mask.min_coverage <= 1, "mask.min_coverage", "must be in (0, 1]")
    at_least(0, "mask.align_level", at_most=16)
    check(
        2 ** (config.mask.align_level or 0) <= grid_size,
        "mask.align_level",
        f"must be a level whose cells fit the {grid_size}x{grid_size} grid",
    )

    one_of("loss.kind", PREDICTION_LOSSES)
    one_of("loss.regularizer", ("vicreg", "sigreg", "none"))
    one_of("loss.regularized", REGULARIZED)
    at_least(0, "loss.summary_weight", "loss.local_weight", "loss.regularizer_weight")
    at_least(0, "loss.variance_weight", "loss.covariance_weight")
    at_least(1, "loss.num_slices", at_most=65_536)
    fraction("loss.cross_view")
    has_top = config.model.global_level or not config.loss.cross_view
    check(has_top, "loss.cross_view", "needs model.global_level=True")
    if config.model.target == "online":
        rule = "needs loss.regularizer='sigreg' of the patches (loss.regularized: context or both)"
        held = config.loss.regularizer == "sigreg" and config.loss.regularizer_weight > 0
        check(held and config.loss.regularized != "summary", "model.target", rule)
    weights = config.loss.level_weights
    weights_rule = f"must be {config.model.num_levels} numbers >= 0, one per level"
    if weights is not None:
        numbers("loss.level_weights", config.model.num_levels, weights_rule)
        check(min(weights) >= 0, "loss.level_weights", weights_rule)
    if config.model.num_summary_tokens == 0:
        rule = "needs model.num_summary_tokens of at least 1"
        check(config.loss.summary_weight == 0, "loss.summary_weight", rule)
        unused = config.loss.regularizer == "none" or config.loss.regularized == "context"
        check(unused, "loss.regularized", rule)

    at_least(0, "optim.learning_rate", "optim.final_learning_rate", "optim.warmup_epochs")
    at_least(0, "optim.weight_decay", "optim.final_weight_decay", "optim.clip_norm")
    for field in ("optim.b1", "optim.b2"):
        check(0 <= get_field(config, field) < 1, field, "must be in [0, 1)")
    ema = config.optim.ema_momentum
    ema_rule = "must be (start, end, constant | linear | cosine), start and end in [0, 1]"
    check(len(ema) == 3, "optim.ema_momentum", ema_rule)
    check(ema[2] in ("constant", "linear", "cosine"), "optim.ema_momentum", ema_rule)
    momenta = all(is_a(float, m) and 0 <= m <= 1 for m in ema[:2])
    check(momenta, "optim.ema_momentum", ema_rule)
    at_least(ema[0], "optim.max_ema_momentum", at_most=1)
    at_least(1, "train.batch_size", "optim.accumulation_steps", at_most=2**20)
    at_least(1, "train.steps_per_call", at_most=10_000)  # whose rows of batches are made at once
    positive("train.num_epochs", "train.num_steps", "train.keep_checkpoints")
    positive("train.checkpoint_every_epochs", "train.checkpoint_every_steps")
    at_least(0, "train.max_nonfinite_steps")
    one_of("train.on_collapse", ("warn", "stop", "ignore"))
    check(
        config.train.batch_size % config.optim.accumulation_steps == 0,
        "optim.accumulation_steps",
        f"must divide train.batch_size={config.train.batch_size}",
    )
    regularizer = config.loss.regularizer
    check(
        regularizer == "none" or config.train.batch_size // config.optim.accumulation_steps >= 2,
        "train.batch_size",
        f"must leave at least 2 images per part, which loss.regularizer='{regularizer}' compares",
    )
    at_least(1, "parallel.cpu_devices", at_most=256)
    at_least(1, "parallel.fsdp")  # run.build_run: it divides the number of devices
    at_least(0, "eval.every_epochs", "log.figures_every_epochs")
    at_least(1, "eval.batch_size", at_most=65_536)
    positive("eval.knn_bank_size", "eval.num_val", "log.every_steps")


def encoder_size(config: Config) -> tuple[int, int, int]:
    """Width, depth and heads of the encoder: those of `model.name` where not given."""
    given = (config.model.width, config.model.depth, config.model.num_heads)
    named = SIZES[config.model.name]
    return tuple(n if g is None else g for g, n in zip(given, named, strict=True))  # pyright: ignore


def differing_fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields in which two configs (plain nested dicts) differ and a continuation must not."""
    old, new = flatten(old), flatten(new)
    missing = object()
    return [
        field
        for field in sorted(old.keys() | new.keys())
        if old.get(field, missing) != new.get(field, missing) and not field.startswith(FREE_FIELDS)
    ]
