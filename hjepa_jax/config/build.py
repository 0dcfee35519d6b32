"""Builds the parts of a run from its config. The folders below do not know configs."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hjepa_jax.config.defaults import Config, encoder_size
from hjepa_jax.config.fields import MAX_NUMBER, get_field
from hjepa_jax.config.sizes import grid_of, local_sides, num_context, num_local_patches
from hjepa_jax.data.augment import Augment, resize_and_normalize
from hjepa_jax.data.pixels import DTYPES
from hjepa_jax.data.records import Streaming
from hjepa_jax.data.sides import pair
from hjepa_jax.errors import InputError
from hjepa_jax.masks.choice import MAX_COMPARED
from hjepa_jax.masks.random_mask import RandomMask
from hjepa_jax.masks.samplers import HierarchicalMask, MaskSampler, MultiBlockMask
from hjepa_jax.method.embed import make_embed_fn
from hjepa_jax.method.objective import Objective
from hjepa_jax.method.optimizer import (
    Schedule,
    interpolation_schedule,
    make_optimizer,
    warmup_cosine_schedule,
)
from hjepa_jax.method.step import LocalViews, Method, TrainStep, make_train_step
from hjepa_jax.method.train_state import TrainState, create_train_state
from hjepa_jax.models.hjepa import HJEPA
from hjepa_jax.models.matmul import Precision
from hjepa_jax.models.predictor import Predictor
from hjepa_jax.models.projection import Projection
from hjepa_jax.models.pyramid import FeaturePyramid
from hjepa_jax.models.vit import VisionTransformer, patchify
from hjepa_jax.runtime.backend import current_rules


@dataclasses.dataclass(frozen=True)
class Schedules:
    """The length of a run, and its schedules as functions of the number of the update, from 1."""

    steps_per_epoch: int
    num_steps: int
    learning_rate_fn: Schedule
    weight_decay_fn: Schedule
    ema_momentum_fn: Schedule

    @property
    def numbers(self) -> tuple[Schedule, Schedule, Schedule]:
        """The schedules as a tree of arrays, which a compiled program takes as an argument."""
        return self.learning_rate_fn, self.weight_decay_fn, self.ema_momentum_fn

    def with_numbers(self, numbers: tuple[Schedule, Schedule, Schedule]) -> "Schedules":
        """Returns a copy with other numbers, such as the arguments of a compiled program."""
        return Schedules(self.steps_per_epoch, self.num_steps, *numbers)


def build_model(config: Config) -> HJEPA:
    """Returns the networks.

    Raises:
      InputError: the backend does not support `model.dtype`, or cannot mask a grid of this size.
    """
    c = config.model
    if c.dtype == "bfloat16" and not current_rules().bfloat16:
        rule = f"must be float32 on {jax.default_backend().lower()}"
        raise InputError("model.dtype", c.dtype, rule)
    width, depth, num_heads = encoder_size(config)
    grid_size = grid_of(config)
    num_patches = math.prod(grid_size)
    if num_patches > MAX_COMPARED and not current_rules().sorts:
        most = f"at most {MAX_COMPARED} on {jax.default_backend().lower()}"
        rule = f"must leave {most}, not {num_patches} patches"
        raise InputError("model.patch_size", c.patch_size, rule)
    shared = {
        "grid_size": grid_size,
        "mlp_ratio": c.mlp_ratio,
        "positions": c.positions,
        "precision": _precision(c.dtype),
        "remat": c.remat,
    }
    pyramid = None
    if c.pyramid != "none":
        pyramid = FeaturePyramid(grid_size, c.num_levels, c.pyramid, shared["precision"])
    projection = None
    if config.loss.agreement_weight:
        projection = Projection(*c.projection, precision=shared["precision"])
    objective = build_objective(config)
    levels = objective.levels
    if pyramid and levels:  # each level of the pyramid depends on all levels above it
        levels = tuple(range(c.num_levels))
    return HJEPA(
        context_encoder=VisionTransformer(
            patch_size=c.patch_size,
            width=width,
            depth=depth,
            num_heads=num_heads,
            num_summary_tokens=c.num_summary_tokens,
            num_registers=c.num_registers,
            drop_path=c.drop_path,
            layer_scale=c.layer_scale,
            stem=c.stem,
            gelu=c.gelu,
            epsilon=c.layer_norm_epsilon,
            pyramid=pyramid,
            **shared,
        ),
        predictor=Predictor(
            num_levels=c.num_levels,
            out_width=width,
            width=c.predictor_width,
            depth=c.predictor_depth,
            num_heads=c.predictor_num_heads,
            mode=c.predictor_mode,
            **shared,
        ),
        levels=levels,
        summary_pass="summary" in objective.weights,
        min_coverage=config.mask.min_coverage,
        regularized=config.loss.regularized,
        projection=projection,
        projection_input=c.projection_input,
    )


def _precision(dtype: str) -> Precision:
    """Returns the precision for `dtype`; results are float32 if the backend prefers that."""
    wide = current_rules().wide_results
    return Precision(jnp.dtype(dtype), jnp.dtype("float32" if wide else dtype))


def build_masks(config: Config) -> MaskSampler:
    """Returns the mask sampler.

    Raises:
      InputError: no block has the wanted area and aspect ratio, or no context remains.
    """
    c, num_levels = config.mask, config.model.num_levels
    shared: dict[str, Any] = {
        "grid_size": grid_of(config),
        "scale": tuple(c.scale),
        "context_scale": tuple(c.context_scale),
        "context_aspect_ratio": tuple(c.context_aspect_ratio),
        "num_context": num_context(config),
    }
    align_level = num_levels - 1 if c.align_level is None else c.align_level
    if c.kind == "random":
        return RandomMask(align_level=align_level, **shared)
    shared |= {"num_blocks": c.num_blocks, "aspect_ratio": tuple(c.aspect_ratio)}
    if c.kind == "hierarchical":
        return HierarchicalMask(num_levels=num_levels, progression=tuple(c.progression), **shared)
    return MultiBlockMask(align_level=align_level, **shared)


def build_streaming(config: Config) -> Streaming:
    """Returns the settings of streaming."""
    c = config.data
    return Streaming(
        when=c.streaming,
        train_split=c.train_split,
        class_list=c.class_list,
        max_labelled=c.max_labelled,
    )


def build_augment(config: Config) -> Augment:
    """Returns the augmentation of training images."""
    c = config.data
    return Augment(
        image_size=c.image_size,
        mean=tuple(c.mean),
        std=tuple(c.std),
        crop_scale=tuple(c.crop_scale),
        crop_ratio=tuple(c.crop_ratio),
        horizontal_flip=c.horizontal_flip,
        vertical_flip=c.vertical_flip,
        brightness=c.brightness,
        contrast=c.contrast,
        saturation=c.saturation,
        hue=c.hue,
        jitter_probability=c.jitter_probability,
        grayscale=c.grayscale,
        blur=c.blur,
        blur_sigma=tuple(c.blur_sigma),
        solarize=c.solarize,
        reduced_sides=None if c.stored_area == 1 else c.image_size,
    )


def build_local_views(config: Config) -> LocalViews | None:
    """Returns the local views: augmented like the masked view, except for crop and size."""
    c = config.data
    if not c.local_views:
        return None
    augment = dataclasses.replace(
        build_augment(config),
        image_size=local_sides(config),
        crop_scale=tuple(c.local_crop_scale),
    )
    return LocalViews(c.local_views, augment, num_local_patches(config))


def build_objective(config: Config) -> Objective:
    """Returns the terms of the loss and their weights."""
    c = config.loss
    level_weights = c.level_weights or (1.0,) * config.model.num_levels
    vicreg_weight = c.regularizer_weight if c.regularizer == "vicreg" else 0.0
    weights = {
        **{f"level_{level}": weight for level, weight in enumerate(level_weights)},
        "summary": c.summary_weight if any(level_weights) else 0.0,
        "variance": vicreg_weight * c.variance_weight,
        "covariance": vicreg_weight * c.covariance_weight,
        "sigreg": c.regularizer_weight if c.regularizer == "sigreg" else 0.0,
        "agreement": c.agreement_weight,
        "spread": c.spread_weight if c.agreement_weight else 0.0,
    }
    weights = {name: float(weight) for name, weight in weights.items() if weight}
    return Objective(
        weights,
        kind=c.kind,
        num_slices=c.num_slices,
        teacher_weight=c.teacher_weight,
        spread_moment=c.spread_moment,
    )


def build_schedules(config: Config, num_images: int) -> Schedules:
    """Returns length and schedules for a training set of `num_images`.

    Raises:
      InputError: the training set does not fill one batch, or there are more than `MAX_NUMBER`
        steps.
    """
    c = config.optim
    steps_per_epoch = num_images // config.train.batch_size
    if steps_per_epoch == 0:
        raise InputError(
            "train.batch_size",
            config.train.batch_size,
            f"must be at most the number of training images, {num_images}",
        )

    def in_steps(field: str) -> int:
        num_epochs = get_field(config, field)
        steps = round(num_epochs * steps_per_epoch)
        if steps > MAX_NUMBER:
            raise InputError(field, num_epochs, f"must be at most {MAX_NUMBER} steps, not {steps}")
        return steps

    num_steps = config.train.num_steps or max(1, in_steps("train.num_epochs"))
    final_weight_decay = c.final_weight_decay
    start, end, kind = c.ema_momentum
    return Schedules(
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        learning_rate_fn=warmup_cosine_schedule(
            c.learning_rate,
            warmup_steps=in_steps("optim.warmup_epochs"),
            num_steps=num_steps,
            end=c.final_learning_rate,
            decay_steps=None if c.decay_epochs is None else in_steps("optim.decay_epochs"),
        ),
        weight_decay_fn=interpolation_schedule(
            c.weight_decay,
            c.weight_decay if final_weight_decay is None else final_weight_decay,
            kind="cosine",
            num_steps=num_steps,
        ),
        ema_momentum_fn=interpolation_schedule(start, end, kind=kind, num_steps=num_steps),
    )


def build_optimizer(config: Config, schedules: Schedules) -> optax.GradientTransformation:
    """Returns AdamW, or Muon with AdamW, with the schedules of the run."""
    return make_optimizer(
        learning_rate_fn=schedules.learning_rate_fn,
        weight_decay_fn=schedules.weight_decay_fn,
        b1=config.optim.b1,
        b2=config.optim.b2,
        clip_norm=config.optim.clip_norm or None,
        muon_momentum=config.optim.muon_momentum if config.optim.kind == "muon" else None,
        muon_precision=_precision(config.model.dtype),
    )


def build_train_step(
    config: Config, model: HJEPA, tx: optax.GradientTransformation, schedules: Schedules
) -> TrainStep:
    """Returns the training step of this config."""
    momentum_fn = None if config.model.target == "online" else schedules.ema_momentum_fn
    return make_train_step(build_method(config, model, tx, momentum_fn))


def build_method(
    config: Config,
    model: HJEPA,
    tx: optax.GradientTransformation,
    ema_momentum_fn: optax.Schedule | None,
) -> Method:
    """Returns the static parts of the training step of this config."""
    return Method(
        model=model,
        tx=tx,
        sample_masks=build_masks(config),
        augment=build_augment(config),
        objective=build_objective(config),
        ema_momentum_fn=ema_momentum_fn,
        local_views=build_local_views(config),
        num_parts=config.optim.accumulation_steps,
    )


def build_preprocess(config: Config) -> Any:
    """Returns the preprocessing of stored images for evaluation: resize and normalise."""
    c = config.data
    resize = functools.partial(
        resize_and_normalize, image_size=c.image_size, mean=tuple(c.mean), std=tuple(c.std)
    )

    def preprocess(images: Any) -> Any:
        if images.dtype not in DTYPES:
            rule = f"must be {', '.join(DTYPES)} here; hjepa_jax.load(workdir).embed(images) helps"
            raise InputError("images", f"{images.dtype}{list(images.shape)}", rule)
        return resize(images)

    return preprocess


def build_embed_fn(config: Config, model: HJEPA, *, num_layers: int = 1) -> Any:
    """Returns `embed(encoder_params, images)` with the image size and normalisation of the config.

    It takes images as a data set stores them. `hjepa_jax.load(workdir).embed(images)` also takes
    floats, files and images of any size, and checks them.

    Raises:
      InputError: the encoder has fewer than `num_layers` blocks ("--num_layers").
    """
    depth = model.context_encoder.depth
    if not 1 <= num_layers <= depth:
        raise InputError("--num_layers", num_layers, f"must be from 1 to {depth}, the blocks")
    return make_embed_fn(model, build_preprocess(config), num_layers=num_layers)


def build_embed_views_fn(config: Config, model: HJEPA, *, num_layers: int = 1) -> Any:
    """Returns `embed_views(encoder_params, images, keys)`: embeds augmented images."""
    augment = build_augment(config)
    return make_embed_fn(model, lambda images, rngs: augment(rngs, images), num_layers=num_layers)


def build_tokens_fn(config: Config, model: HJEPA, *, dtype: str = "float16") -> Any:
    """Returns `embed_tokens(encoder_params, images)`: {"tokens": [B, N, D]} of type `dtype`.

    If `encoder_params` is None, the tokens are the patches of normalised pixels, [B, N, P * P * C].
    """
    preprocess = build_preprocess(config)
    apply: Any = model.apply

    def embed_tokens(encoder_params: Any, images: Any) -> dict[str, Any]:
        pixels = preprocess(images)
        if encoder_params is None:
            tokens = patchify(pixels, config.model.patch_size)
        else:
            variables = {"params": {"context_encoder": encoder_params}}
            tokens, _ = apply(variables, pixels, method="encode")
        return {"tokens": tokens.astype(dtype)}

    return embed_tokens


def build_create_state(
    config: Config, model: HJEPA, tx: optax.GradientTransformation
) -> Callable[[], TrainState]:
    """Returns a function, to jit, that creates the state at step 0 from `config.seed`."""
    init_rng, train_rng = jax.random.split(jax.random.PRNGKey(config.seed))
    images = jnp.zeros((1, *pair(config.data.image_size), len(config.data.mean)))
    running = config.loss.agreement_weight and config.loss.spread_moment == "running"
    moment_width = config.model.projection[1] if running else None

    def create_state() -> TrainState:
        params = model.init(init_rng, images, build_masks(config)(init_rng[None]))["params"]
        return create_train_state(params, tx, train_rng, moment_width=moment_width)

    return create_state


def initial_state(
    config: Config, model: HJEPA, schedules: Schedules, numbers: tuple[Schedule, Schedule, Schedule]
) -> TrainState:
    """Returns the state at step 0; to jit with `numbers` as arguments.

    So runs with other learning rates or another length share one program.
    """
    tx = build_optimizer(config, schedules.with_numbers(numbers))
    return build_create_state(config, model, tx)()
