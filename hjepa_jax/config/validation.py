"""The check of a config, before data or backend are touched."""

import math

from hjepa_jax.config.defaults import SIZES, Config, base_config, encoder_size
from hjepa_jax.config.fields import check_types, get_field, is_a
from hjepa_jax.errors import InputError
from hjepa_jax.method.losses import PREDICTION_LOSSES
from hjepa_jax.method.targets import WHOLES
from hjepa_jax.models.hjepa import REGULARIZED
from hjepa_jax.models.positions import POSITIONS
from hjepa_jax.models.predictor import MODES
from hjepa_jax.models.pyramid import FUSIONS
from hjepa_jax.models.transformer import GELUS
from hjepa_jax.runtime.backend import PLATFORMS


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
    one_of("platform", PLATFORMS)

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
    agree, summaries = config.loss.agreement_weight > 0, config.model.num_summary_tokens > 0
    rule = "needs model.num_summary_tokens of at least 1"
    check(summaries or not agree, "loss.agreement_weight", rule)
    rule = "needs data.local_views of at least 1, to agree with the view that is masked"
    check(config.data.local_views > 0 or not agree, "loss.agreement_weight", rule)
    has_top = config.model.global_level and summaries
    predict = has_top and config.loss.local_weight > 0
    rule = "needs loss.agreement_weight above 0, or what they predict: model.global_level=True, "
    rule += "loss.local_weight above 0, and model.num_summary_tokens of at least 1"
    check(agree or predict or not config.data.local_views, "data.local_views", rule)
    fraction("data.horizontal_flip", "data.vertical_flip")
    fraction("data.grayscale", "data.blur", "data.solarize")
    increasing("data.blur_sigma", 0, 100)
    fraction("data.brightness", "data.contrast", "data.saturation")

    one_of("model.name", tuple(SIZES))
    one_of("model.positions", POSITIONS)
    one_of("model.dtype", ("float32", "bfloat16"))
    one_of("model.gelu", GELUS)
    at_least(1, "model.width", "model.predictor_width", "model.patch_size", at_most=8192)
    at_least(1, "model.depth", "model.predictor_depth", at_most=256)
    at_least(1, "model.num_heads", "model.predictor_num_heads", at_most=256)
    at_least(0.25, "model.mlp_ratio", at_most=64)  # of a width of at least 4: one unit
    at_least(1, "model.num_levels", at_most=16)
    at_least(0, "model.num_summary_tokens", at_most=1024)
    at_least(0, "model.num_registers", at_most=1024)
    at_least(0, "model.layer_scale", at_most=100)
    check(0 <= config.model.drop_path < 1, "model.drop_path", "must be in [0, 1)")
    epsilon = config.model.layer_norm_epsilon
    check(0 < epsilon <= 1, "model.layer_norm_epsilon", "must be in (0, 1]")
    one_of("model.predictor_mode", MODES)
    one_of("model.pyramid", ("none", *FUSIONS))
    stands = config.model.pyramid == "none" or config.model.num_levels > 1
    check(stands, "model.pyramid", "needs model.num_levels of at least 2")
    # Through targets with a gradient it could learn to make all of them the same.
    held = config.model.pyramid == "none" or config.model.target == "ema"
    check(held, "model.pyramid", "needs model.target='ema'")
    one_of("model.target", ("ema", "online"))
    one_of("model.global_target", WHOLES)
    rule = "needs model.global_level=True and model.num_summary_tokens of at least 1"
    check(has_top or config.model.global_target != "summary", "model.global_target", rule)
    width, depth, num_heads = encoder_size(config)
    levels, depths = config.model.num_levels, config.model.level_depths
    depths = (depth,) * levels if depths is None else depths
    rule = f"must be one block per level, {levels} whole numbers from 1 to {depth}"
    check(all(is_a(int, d) and 1 <= d <= depth for d in depths), "model.level_depths", rule)
    check(len(depths) == levels, "model.level_depths", rule)
    rule = f"must be from 1 to {min(depths)}, the first of the blocks of model.level_depths"
    rule = f"must be from 1 to {depth}" if config.model.level_depths is None else rule
    check(1 <= config.model.target_layers <= min(depths), "model.target_layers", rule)
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
    shown = config.data.local_patches
    rule = f"must be from 1 to {side**2}, the patches of data.local_size={config.data.local_size}"
    check(shown is None or 1 <= shown <= side**2, "data.local_patches", rule)
    rule = "must be two whole numbers, hidden width and features, from 2 to 8192"
    sizes = config.model.projection
    is_size = len(sizes) == 2 and all(is_a(int, n) and 2 <= n <= 8192 for n in sizes)
    check(is_size, "model.projection", rule)
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
    at_least(1, "mask.num_masks", at_most=64)
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
    at_least(0, "loss.variance_weight", "loss.covariance_weight", "loss.agreement_weight")
    at_least(0, "loss.spread_weight")
    rule = "must be greater than 0 where loss.agreement_weight is: all images would be alike"
    check(config.loss.spread_weight > 0 or not agree, "loss.spread_weight", rule)
    at_least(1, "loss.num_slices", at_most=65_536)
    fraction("loss.cross_view")
    has_global = config.model.global_level or not config.loss.cross_view
    check(has_global, "loss.cross_view", "needs model.global_level=True")
    if config.model.target == "online":
        rule = "needs loss.regularizer='sigreg' of the patches (loss.regularized: context or both)"
        held = config.loss.regularizer == "sigreg" and config.loss.regularizer_weight > 0
        check(held and config.loss.regularized != "summary", "model.target", rule)
        # Each kind of target must be held apart by the regularizer.
        both = config.model.global_target == "patches" or config.loss.regularized == "both"
        rule = "needs loss.regularized='both', for model.global_target='summary'"
        check(both, "model.target", rule)
        last = config.model.target_layers == 1 and config.model.level_depths is None
        rule = "needs targets of the last block, which alone is regularized: model.target_layers=1"
        check(last, "model.target", f"{rule} and no model.level_depths")
    of_terms = {"vicreg": config.loss.variance_weight + config.loss.covariance_weight}
    weight = config.loss.regularizer_weight * of_terms.get(config.loss.regularizer, 1.0)
    rule = "must be none where loss.regularizer_weight, or both weights of vicreg, are 0"
    check(weight > 0 or config.loss.regularizer == "none", "loss.regularizer", rule)
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

    at_least(0, "optim.learning_rate", "optim.final_learning_rate")
    at_least(0, "optim.warmup_epochs", "optim.decay_epochs")
    at_least(0, "optim.weight_decay", "optim.final_weight_decay", "optim.clip_norm")
    one_of("optim.kind", ("adamw", "muon"))
    for field in ("optim.b1", "optim.b2", "optim.muon_momentum"):
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
    compares = "loss.agreement_weight" if agree else "loss.regularizer"
    each_alone = not agree and config.loss.regularizer == "none"
    check(
        each_alone or config.train.batch_size // config.optim.accumulation_steps >= 2,
        "train.batch_size",
        "must leave at least 2 images per part, which "
        f"{compares}={get_field(config, compares)!r} compares",
    )
    at_least(1, "parallel.cpu_devices", at_most=256)
    at_least(1, "parallel.fsdp")  # run.build_run: it divides the number of devices
    at_least(0, "eval.every_epochs", "log.figures_every_epochs")
    at_least(1, "eval.batch_size", at_most=65_536)
    positive("eval.knn_bank_size", "eval.num_val", "log.every_steps")
