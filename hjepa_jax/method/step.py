"""The training step and the embedding function: pure functions of (state, batch).

Nothing here reads a config. `make_train_step` closes over the static parts and returns a
function to jit; `make_run_steps` puts several such steps and their metrics into one program.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int, UInt8

from hjepa_jax.data.augment import Augment
from hjepa_jax.masks.masks import gather_tokens
from hjepa_jax.masks.samplers import MaskSampler
from hjepa_jax.method.health import health
from hjepa_jax.method.keys import (
    NO_IMAGE,
    batch_rng,
    image_rngs,
    more_rngs,
    some_patches,
    view_rngs,
)
from hjepa_jax.method.objective import LossWeights, hjepa_loss
from hjepa_jax.method.optimizer import Schedule, global_norm
from hjepa_jax.method.targets import TargetSpec, encode_targets, target_depths
from hjepa_jax.method.train_state import TrainState, ema_update
from hjepa_jax.method.window import LogWindow, select, update_window
from hjepa_jax.models.hjepa import HJEPA


@struct.dataclass
class StepOutputs:
    """What a step reports.

    Attributes:
      scalars: by metric name, float32 [].
      features: float32 [B, D], of each image.
      finite: bool [], whether loss and gradient are; where not, the update was left out.
    """

    scalars: dict[str, Any]
    features: Any
    finite: Any = None


TrainStep = Callable[[TrainState, UInt8[Array, "*B H W C"]], tuple[TrainState, StepOutputs]]


def make_train_step(
    *,
    model: HJEPA,
    tx: optax.GradientTransformation,
    sample_masks: MaskSampler,
    augment: Augment,
    loss_weights: LossWeights,
    ema_momentum_fn: Schedule | None,
    target_spec: TargetSpec | None = None,
    num_accumulation_steps: int = 1,
    augment_local: Augment | None = None,
    num_local_views: int = 0,
    num_local_patches: int | None = None,
    num_masks: int = 1,
) -> TrainStep:
    """Returns `train_step(state, images) -> (state, outputs)`, one optimizer update.

    Args:
      model: the online networks.
      tx: optax transformation; its schedules count updates from 1.
      sample_masks: masks of a batch from one key per image.
      augment: uint8 images to normalised pixels, from one key per image.
      loss_weights: how the terms of the loss are combined.
      ema_momentum_fn: m as a function of the number of the update, from 1. None for no EMA: the
        targets are then features of the context encoder itself, and the gradient flows through
        them too (the regularizer alone keeps them from collapsing).
      target_spec: what the targets are made of; None for the output of the target encoder.
      num_accumulation_steps: the batch is split into as many parts, whose gradients are averaged
        before the update: consecutive images. The step also takes a batch that is cut already,
        [parts, B / parts, H, W, C]. On several devices only such a batch lets every device keep
        its images: of a batch that is not cut, each device would have images of one part alone,
        and all of them would be sent around. Means over the batch (of valid queries; VICReg,
        SIGReg, the projection, the spread of views) are then those of a part; SIGReg grows with
        its rows, and so is smaller by as much.
      augment_local: as `augment`, for local views: small crops, at a size of their own; None for
        no such views.
      num_local_views: V >= 1, how many of those each image has (Caron et al. 2020, arXiv
        2006.09882, section 3.4, "multi-crop"); the model has a global level, which they predict,
        or a projection, in which they agree.
      num_local_patches: how many patches the encoder sees of each of them, drawn at random; None
        for all.
      num_masks: how many masks each image has, whose targets are computed once (Baevski et al.
        2022, arXiv 2212.07525, section 3.3, "multi-mask training").
    """
    apply, global_terms = _untyped_apply(model), dict(loss_weights.global_terms)
    cross_view = "loss_cross_view" in global_terms
    spec = target_spec or TargetSpec(
        target_depths(model.context_encoder.depth, model.predictor.num_levels)
    )

    def per_mask(x: Array) -> Array:
        return x if num_masks == 1 else jnp.repeat(x, num_masks, axis=0)

    def make_targets(
        encoder_params: Any, views: Array, second_views: Array | None, target_index: Array
    ) -> tuple[tuple[Array, ...], Array]:
        """Targets of every level and query, and the tokens that the target encoder gave."""
        found = encode_targets(model, encoder_params, views, spec)
        levels = [*found.levels]
        if "loss_global" in global_terms:
            levels.append(found.whole)
        if second_views is not None:
            levels.append(encode_targets(model, encoder_params, second_views, spec).whole)
        finest, *coarse = (per_mask(level) for level in levels)
        return (gather_tokens(finest, target_index), *coarse), found.tokens

    def loss_and_grads(
        state: TrainState, images: Array, augment_rngs: Array, mask_rngs: Array
    ) -> tuple[Any, StepOutputs]:
        # 1. Masks (and the augmented views they apply to).
        masks = sample_masks(mask_rngs if num_masks == 1 else more_rngs(mask_rngs, num_masks))
        views = augment(augment_rngs, images)

        # 2. Forward, loss, gradient. The targets come from the EMA parameters alone (if any).
        second_views = augment(view_rngs(augment_rngs, 1), images) if cross_view else None
        local_views = local_index = None
        if augment_local is not None:
            # One call for all views, so that the program does not grow with their number.
            of_views = functools.partial(jax.vmap, out_axes=1)
            local_rngs = jnp.stack([view_rngs(augment_rngs, 2 + v) for v in range(num_local_views)])
            local_views = of_views(functools.partial(augment_local, images=images))(local_rngs)
            if num_local_patches is not None:
                side = augment_local.image_size // model.context_encoder.patch_size
                choose = functools.partial(some_patches, num_patches=side**2, k=num_local_patches)
                local_index = of_views(choose)(local_rngs)
        target_index = masks.target_index.reshape(num_masks * len(views), -1)
        inputs = (views, second_views, target_index)
        rng = batch_rng(state.rng, state.step)
        rngs = {}
        if model.context_encoder.drop_path:  # of this part of the batch
            rngs["drop_path"] = jax.random.fold_in(mask_rngs[0], NO_IMAGE)
        ema_targets = None
        if ema_momentum_fn is not None:
            ema_targets = jax.lax.stop_gradient(make_targets(state.target_params, *inputs))

        def loss_fn(params: Any) -> tuple[Array, Any]:
            targets, tokens = ema_targets or make_targets(params["context_encoder"], *inputs)
            seen = (per_mask(views), masks, local_views, local_index)
            prediction = apply({"params": params}, *seen, rngs=rngs)
            loss, scalars = hjepa_loss(prediction, targets, loss_weights, rng)
            return loss, (scalars, prediction, targets, tokens)

        (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        scalars, prediction, targets, tokens = aux
        features = jnp.mean(tokens, axis=1)
        found = health(prediction, targets, tokens, num_levels=model.predictor.num_levels)
        return grads, StepOutputs(scalars | found, features)

    def accumulated(
        state: TrainState, images: Array, augment_rngs: Array, mask_rngs: Array
    ) -> tuple[Any, StepOutputs]:
        def cut(x: Array) -> Array:
            return x.reshape(num_accumulation_steps, -1, *x.shape[1:])

        # Images that are cut already stay as they are laid out on the devices.
        images = images if images.ndim == 5 else cut(images)
        parts = (images, cut(augment_rngs), cut(mask_rngs))

        def add(total: Any, part: Any) -> tuple[Any, StepOutputs]:
            grads, outputs = loss_and_grads(state, *part)
            return jax.tree.map(jnp.add, total, grads), outputs

        # A scan, not an unrolled loop, so that one part's activations are alive at a time.
        total, outputs = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.params), parts)
        grads = jax.tree.map(lambda g: g / num_accumulation_steps, total)
        scalars = {name: jnp.mean(value) for name, value in outputs.scalars.items()}
        features = outputs.features
        return grads, StepOutputs(scalars, features.reshape(-1, features.shape[-1]))

    def train_step(
        state: TrainState, images: UInt8[Array, "*B H W C"]
    ) -> tuple[TrainState, StepOutputs]:
        rngs = image_rngs(state.rng, state.step, math.prod(images.shape[:-3]))
        gradient = loss_and_grads if num_accumulation_steps == 1 else accumulated
        grads, outputs = gradient(state, images, *rngs)

        # 3. Optimizer update.
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)

        # 4. EMA, of the updated parameters. Without one, what is judged is the encoder itself.
        target_params = params["context_encoder"]
        if ema_momentum_fn is not None:
            ema_momentum = ema_momentum_fn(state.step + 1)
            target_params = ema_update(state.target_params, target_params, ema_momentum)

        outputs.scalars["grad_norm"] = global_norm(grads)
        outputs.scalars["update_norm"] = global_norm(updates)
        outputs.scalars["param_norm"] = global_norm(params)

        # A step that is not finite leaves all as it was, but for its number: masks, augmentation
        # and data of the next one differ, so that it may do better.
        finite = jnp.isfinite(outputs.scalars["loss"]) & jnp.isfinite(outputs.scalars["grad_norm"])
        params, target_params, opt_state = select(
            finite,
            (params, target_params, opt_state),
            (state.params, state.target_params, state.opt_state),
        )
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            target_params=target_params,
            opt_state=opt_state,
            rng=state.rng,
        )
        return new_state, dataclasses.replace(outputs, finite=finite)

    return train_step


def make_run_steps(train_step: TrainStep) -> Callable[..., tuple[TrainState, LogWindow]]:
    """Returns a function that makes up to S updates in one program.

    The result, `run_steps(state, window, images, index, count)`, takes the whole training set
    (uint8 [n, H, W, C]), the rows of each batch (int32 [S, B]) and how many of the S batches to
    run, which may change from call to call without compiling again. If the training set is not on
    the device, it takes the batches themselves, uint8 [S, B, H, W, C], and None for the index.
    With gradient accumulation, B stands for two dimensions: parts, and images of a part.
    """

    def run_steps(
        state: TrainState,
        window: LogWindow,
        images: UInt8[Array, "... H W C"],
        index: Int[Array, "S ..."] | None,
        count: Int[Array, ""],
    ) -> tuple[TrainState, LogWindow]:
        def body(i: Any, carry: tuple[TrainState, LogWindow]) -> tuple[TrainState, LogWindow]:
            state, window = carry
            batch = images[i] if index is None else images[index[i]]
            new_state, outputs = train_step(state, batch)
            return new_state, update_window(
                window, outputs.scalars, outputs.features, state.step, outputs.finite
            )

        num_batches = len(images) if index is None else len(index)
        if num_batches == 1:  # no loop in the program where there is nothing to repeat
            return body(0, (state, window))
        return jax.lax.fori_loop(0, count, body, (state, window))

    return run_steps


def _untyped_apply(model: HJEPA) -> Any:
    """`model.apply`, of whose results a type checker cannot know whether they are pairs."""
    return model.apply
