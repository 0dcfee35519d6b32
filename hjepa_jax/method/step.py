"""The training step, a pure function of (state, images).

1. masks and views     `sample_inputs`
2. targets             `encode_targets`
3. loss and gradient   `gradient`, or `accumulated_gradient` for a batch in parts
4. optimizer update and 5. EMA   `update`
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
from jaxtyping import Array, Float, Num, Shaped

from hjepa_jax.data.augment import Augment
from hjepa_jax.data.sides import pair
from hjepa_jax.masks.masks import Masks, gather_tokens
from hjepa_jax.masks.samplers import MaskSampler
from hjepa_jax.method.health import health
from hjepa_jax.method.keys import NO_IMAGE, batch_rng, image_rngs, some_patches, view_rngs
from hjepa_jax.method.objective import (
    Objective,
    loss_terms,
    reported_terms,
    second_moment,
    weighted_sum,
)
from hjepa_jax.method.optimizer import Schedule, global_norm
from hjepa_jax.method.train_state import TrainState, ema_update, select, with_moment
from hjepa_jax.models.hjepa import HJEPA, Targets


@dataclasses.dataclass(frozen=True)
class LocalViews:
    """Further small crops of each image. The loss pulls the projections of all views together.

    Attributes:
      count: V >= 1, views per image.
      augment: as for the masked view, with another output size.
      num_patches: patches of each view that the encoder sees, drawn at random; None = all.

    References:
      Caron et al. 2020, arXiv 2006.09882, section 3.4 ("multi-crop").
    """

    count: int
    augment: Augment
    num_patches: int | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """The static parts of a training step.

    Attributes:
      model: the networks.
      tx: optax transformation; its schedules count updates from 1.
      sample_masks: masks of a batch from one key per image.
      augment: uint8 images to normalised pixels, from one key per image.
      objective: the terms of the loss.
      ema_momentum_fn: m as a function of the number of the update, from 1. None = no EMA: the
        context encoder gives the targets, with a gradient, and only the regularizer prevents a
        collapse.
      local_views: further views of each image; None = none.
      num_parts: number of parts of the batch for gradient accumulation; the gradients of the parts
        are averaged. Means over queries and batch statistics (VICReg, SIGReg, projection, spread)
        are computed per part.
    """

    model: HJEPA
    tx: optax.GradientTransformation
    sample_masks: MaskSampler
    augment: Augment
    objective: Objective
    ema_momentum_fn: Schedule | None
    local_views: LocalViews | None = None
    num_parts: int = 1

    @property
    def needs_targets(self) -> bool:
        """Whether a term of the loss reads the target encoder."""
        return bool(self.model.predicted_levels) or self.objective.teacher_weight > 0


@struct.dataclass
class Inputs:
    """The inputs of the networks for one batch.

    Attributes:
      masks: which patches are visible, and which are predicted.
      view: float32 [B, S, S, C], the augmented images.
      local_views: float32 [B, V, s, s, C]; None without local views.
      local_index: int32 [B, V, P], the patches of each local view that the encoder sees; None =
        all.
    """

    masks: Masks
    view: Any
    local_views: Any = None
    local_index: Any = None


@struct.dataclass
class StepOutputs:
    """The outputs of a step besides the new state.

    Attributes:
      scalars: by metric name, float32 [].
      features: float32 [B, D], one vector per image: the mean patch token of the target encoder,
        or of the context encoder if the loss needs no targets.
      finite: bool [], whether loss and gradient are finite. If not, the update was skipped. Set by
        `update`.
      spread_moment: float32 [K, K], the running moment after this batch, which `gradient` hands to
        `update`; None if the state has none.
    """

    scalars: dict[str, Any]
    features: Any
    finite: Any = None
    spread_moment: Any = None


TrainStep = Callable[[TrainState, Num[Array, "*B H W C"]], tuple[TrainState, StepOutputs]]


def make_train_step(method: Method) -> TrainStep:
    """Returns `train_step(state, images) -> (state, outputs)`, to jit."""
    return functools.partial(train_step, method)


def train_step(
    method: Method, state: TrainState, images: Num[Array, "*B H W C"]
) -> tuple[TrainState, StepOutputs]:
    """Makes one optimizer update.

    With gradient accumulation the batch may come in parts, [parts, B / parts, H, W, C]. On several
    devices only this layout avoids moving images between devices.
    """
    rngs = image_rngs(state.rng, state.step, math.prod(images.shape[:-3]))
    make_gradient = gradient if method.num_parts == 1 else accumulated_gradient
    grads, outputs = make_gradient(method, state, images, *rngs)
    return update(method, state, grads, outputs)


def gradient(
    method: Method,
    state: TrainState,
    images: Num[Array, "B H W C"],
    augment_rngs: Shaped[Array, "B ..."],
    mask_rngs: Shaped[Array, "B ..."],
) -> tuple[Any, StepOutputs]:
    """Gradient of the loss with respect to the online parameters, and the outputs of the step."""
    model, objective = method.model, method.objective

    # 1. Masks, and the augmented views that they apply to.
    inputs = sample_inputs(method, images, augment_rngs, mask_rngs)

    # 2. Targets, from the EMA parameters alone (without an EMA: within `loss_fn`).
    ema_targets = None
    if method.ema_momentum_fn is not None:
        ema_targets = jax.lax.stop_gradient(encode_targets(method, state.target_params, inputs))

    # 3. Loss and gradient.
    rng = batch_rng(state.rng, state.step)
    rngs = {}
    if model.context_encoder.drop_path:  # one key for each part of a batch
        rngs["drop_path"] = jax.random.fold_in(mask_rngs[0], NO_IMAGE)

    def loss_fn(params: Any) -> tuple[Array, Any]:
        found = ema_targets
        if method.ema_momentum_fn is None:
            found = encode_targets(method, params["context_encoder"], inputs)
        targets = {} if found is None else _at_queries(found.levels, inputs.masks)
        apply: Any = model.apply
        teacher = found if objective.teacher_weight else None
        seen = (inputs.view, inputs.masks, inputs.local_views, inputs.local_index, teacher)
        prediction = apply({"params": params}, *seen, rngs=rngs)
        moment = second_moment(objective, prediction.projected, state.spread_moment)
        terms = loss_terms(objective, prediction, targets, rng, moment)
        loss = weighted_sum(objective.weights, terms)
        return loss, (terms, prediction, found, targets, moment)

    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    terms, prediction, found, targets, moment = aux
    tokens = None if found is None else found.tokens
    features = prediction.context_mean if tokens is None else jnp.mean(tokens, axis=1)
    reported = reported_terms(objective, terms, prediction.projected)
    scalars = {"loss": loss, **{f"loss_{name}": term for name, term in reported.items()}}
    scalars |= health(prediction, targets, tokens)
    running = None if moment is None or state.spread_moment is None else moment[0]
    return grads, StepOutputs(scalars, features, spread_moment=running)


def sample_inputs(
    method: Method,
    images: Num[Array, "B H W C"],
    augment_rngs: Shaped[Array, "B ..."],
    mask_rngs: Shaped[Array, "B ..."],
) -> Inputs:
    """Masks, the masked view and the local views of each image, from its keys."""
    masks, view = method.sample_masks(mask_rngs), method.augment(augment_rngs, images)
    local = method.local_views
    if local is None:
        return Inputs(masks, view)
    # One call for all views, so that the program does not grow with their number.
    per_view = functools.partial(jax.vmap, out_axes=1)
    rngs = jnp.stack([view_rngs(augment_rngs, 2 + v) for v in range(local.count)])
    views = per_view(functools.partial(local.augment, images=images))(rngs)
    if local.num_patches is None:
        return Inputs(masks, view, views)
    patch_size = method.model.context_encoder.patch_size
    total = math.prod(pair(local.augment.image_size)) // patch_size**2
    choose = functools.partial(some_patches, num_patches=total, k=local.num_patches)
    return Inputs(masks, view, views, per_view(choose)(rngs))


def encode_targets(method: Method, encoder_params: Any, inputs: Inputs) -> Targets | None:
    """Features of the whole masked view by an encoder; None if no term of the loss needs them."""
    if not method.needs_targets:
        return None
    apply: Any = method.model.apply
    variables = {"params": {"context_encoder": encoder_params}}
    return apply(variables, inputs.view, method="targets")


def _at_queries(levels: dict[int, Array], masks: Masks) -> dict[int, Float[Array, "B _ D"]]:
    """The target of each query: at level 0 for the target patches, above for all cells."""
    index = masks.target_index.reshape(len(masks.target_index), -1)
    return {level: x if level else gather_tokens(x, index) for level, x in levels.items()}


def accumulated_gradient(
    method: Method,
    state: TrainState,
    images: Num[Array, "*B H W C"],
    augment_rngs: Shaped[Array, "B ..."],
    mask_rngs: Shaped[Array, "B ..."],
) -> tuple[Any, StepOutputs]:
    """The mean of `gradient` over the parts of a batch, one part at a time."""

    def cut(x: Array) -> Array:
        return x.reshape(method.num_parts, -1, *x.shape[1:])

    # Images that come in parts keep their layout on the devices.
    images = images if images.ndim == 5 else cut(images)
    parts = (images, cut(augment_rngs), cut(mask_rngs))

    def add(carry: Any, part: Any) -> tuple[Any, StepOutputs]:
        total, moment = carry
        grads, outputs = gradient(method, with_moment(state, moment), *part)
        total = jax.tree.map(jnp.add, total, grads)
        moment = outputs.spread_moment
        return (total, moment), dataclasses.replace(outputs, spread_moment=None)

    # A scan, not an unrolled loop: only the activations of one part are in memory at a time.
    start = (jax.tree.map(jnp.zeros_like, state.params), state.spread_moment)
    (total, moment), outputs = jax.lax.scan(add, start, parts)
    grads = jax.tree.map(lambda g: g / method.num_parts, total)
    scalars = {name: jnp.mean(value) for name, value in outputs.scalars.items()}
    features = outputs.features.reshape(-1, outputs.features.shape[-1])
    return grads, StepOutputs(scalars, features, spread_moment=moment)


def update(
    method: Method, state: TrainState, grads: Any, outputs: StepOutputs
) -> tuple[TrainState, StepOutputs]:
    """The state after the optimizer update and the EMA, and the outputs with the step's norms."""
    # 4. Optimizer update.
    updates, opt_state = method.tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)

    # 5. EMA of the updated parameters. Without an EMA, `target_params` are the parameters.
    target_params = params["context_encoder"]
    if method.ema_momentum_fn is not None:
        ema_momentum = method.ema_momentum_fn(state.step + 1)
        target_params = ema_update(state.target_params, target_params, ema_momentum)

    norms = {"grad_norm": grads, "update_norm": updates, "param_norm": params}
    scalars = outputs.scalars | {name: global_norm(tree) for name, tree in norms.items()}

    # A non-finite step changes only the step number. The next step has other masks, augmentation
    # and data, and may be finite.
    finite = jnp.isfinite(scalars["loss"]) & jnp.isfinite(scalars["grad_norm"])
    changed = {"params": params, "target_params": target_params, "opt_state": opt_state}
    new = dataclasses.replace(with_moment(state, outputs.spread_moment), **changed)
    new_state = dataclasses.replace(select(finite, new, state), step=state.step + 1)
    return new_state, StepOutputs(scalars, outputs.features, finite)
