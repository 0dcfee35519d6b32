"""Fine-tuning: the encoder and a linear head, trained together on labelled images.

    scores, params = finetune(
        encoder, encoder_params, train, test, settings, augment=..., preprocess=...
    )

References:
  Clark et al. 2020, "ELECTRA" (arXiv 2003.10555), section 3.1, and Bao et al. 2021, "BEiT"
  (arXiv 2106.08254), section 3.1: a learning rate that decays layer by layer towards the input.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, Num

from hjepa_jax.config.fields import MAX_NUMBER
from hjepa_jax.data.augment import Augment
from hjepa_jax.data.base import Split
from hjepa_jax.data.order import BatchOrder
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import extract_features, progress
from hjepa_jax.method.optimizer import make_optimizer, warmup_cosine_schedule
from hjepa_jax.models.transformer import layer_norm
from hjepa_jax.models.vit import VisionTransformer
from hjepa_jax.runtime.backend import initialise


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """Hyper-parameters of a fine-tuning. None of them is chosen by a score.

    Attributes:
      num_classes: number of classes.
      num_epochs: passes over the training images; may be a fraction.
      batch_size: images per update, at most the size of the training set.
      learning_rate: peak for the head; warm-up over a tenth of the steps, then cosine decay to 0.
      layer_decay: factor on the learning rate per block, from the head towards the input.
      weight_decay: decoupled weight decay of the kernels.
      drop_path: see `VisionTransformer`.
      label_smoothing: share of the target that is spread over all classes.
      seed: seed of head, order, augmentation and drop path.
    """

    num_classes: int
    num_epochs: float = 20.0
    batch_size: int = 128
    learning_rate: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    seed: int = 0


@runtime_checkable
class Checkpoints(Protocol):
    """Storage for the state of a fine-tuning, to resume after an interruption."""

    def restore(self, state: Any) -> Any:
        """Returns the newest saved state; the given one if there is none."""
        ...

    def save(self, step: int, state: Any) -> None:
        """Saves `state`; it replaces the previous one."""
        ...


@struct.dataclass
class FinetuneState:
    """Number of updates, parameters, optimizer, and the loss summed over the current epoch."""

    step: Any
    params: Any
    opt_state: Any
    epoch_loss: Any


class Classifier(nn.Module):
    """Mean of the patch tokens, LayerNorm, linear head."""

    encoder: VisionTransformer
    num_classes: int

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        tokens, _ = self.encoder(images)
        x = layer_norm("norm")(jnp.mean(tokens, axis=1))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(x)


def layer_scales(params: Any, *, depth: int, layer_decay: float) -> Any:
    """Returns the factor on the learning rate of every parameter of a `Classifier`.

    The factor is 1 for the head, and `layer_decay` for the final norm and the last block of the
    encoder. Each block before it has one more factor `layer_decay`. Patch embedding, positions and
    summary tokens have one more than the first block.
    """

    def scale(path: Any, _: Any) -> float:
        names = [entry.key for entry in path]
        if names[0] != "encoder":
            return 1.0
        if names[1].startswith("block_"):
            return layer_decay ** (depth - int(names[1].removeprefix("block_")))
        return layer_decay if names[1] == "norm" else layer_decay ** (depth + 1)

    return jax.tree_util.tree_map_with_path(scale, params)


def finetune(
    encoder: VisionTransformer,
    encoder_params: Any,
    train: Split,
    test: Split,
    settings: FinetuneSettings,
    *,
    augment: Augment,
    preprocess: Callable[[Any], Any],
    checkpoints: Checkpoints | None = None,
    what: str = "",
) -> tuple[dict[str, float], Any]:
    """Trains encoder and head on all training images; scores the test set once, at the end.

    Args:
      encoder: architecture; the settings replace its `drop_path`.
      encoder_params: initial parameters; not changed.
      train: labelled training images.
      test: labelled test images.
      settings: hyper-parameters.
      augment: converts (keys, uint8 images) to normalised pixels, for training.
      preprocess: converts uint8 images to normalised pixels, for the test.
      checkpoints: saves the state after every epoch, and restores it.
      what: title of the progress bar; empty = none.

    Returns:
      The scores, "top1" on the test set, fraction in [0, 1], and "train_loss", mean over the last
      epoch, nats; and the parameters of the `Classifier`.
    """
    batch_size = min(settings.batch_size, len(train.images))
    order = BatchOrder(len(train.images), batch_size, settings.seed)
    num_steps = _num_steps(settings, order)
    model = Classifier(encoder.clone(drop_path=settings.drop_path), settings.num_classes)
    init_rng, run_rng = jax.random.split(jax.random.PRNGKey(settings.seed))

    first = jnp.asarray(train.images[:1])
    params = initialise(lambda: model.init(init_rng, preprocess(first))["params"])
    params = {**params, "encoder": jax.tree.map(jnp.copy, encoder_params)}
    scales = layer_scales(params, depth=encoder.depth, layer_decay=settings.layer_decay)
    tx = _optimizer(settings, scales, num_steps)
    state = FinetuneState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.zeros(()))
    if checkpoints is not None:
        state = checkpoints.restore(state)
    update = _make_update(model, tx, settings, augment, run_rng, order.steps_per_epoch)

    with progress(what, num_steps, unit=" steps", initial=int(state.step)) as bar:
        for step in range(int(state.step), num_steps):
            (rows,) = order.batches(step, 1, size=1)
            state = update(state, train.images[rows], train.classes[rows])
            bar.update(1)
            done = step + 1
            if checkpoints is not None and (done % order.steps_per_epoch == 0 or done == num_steps):
                checkpoints.save(done, state)
    train_loss = float(state.epoch_loss) / ((num_steps - 1) % order.steps_per_epoch + 1)
    if not math.isfinite(train_loss):
        rule = f"the loss is not finite at a learning rate of {settings.learning_rate:g}"
        raise InputError("--protocols", "finetune", rule)
    top1 = _test_top1(model, state.params, test, preprocess, batch_size)
    return {"top1": top1, "train_loss": train_loss}, state.params


def _test_top1(
    model: Classifier, params: Any, test: Split, preprocess: Callable[[Any], Any], batch_size: int
) -> float:
    classify = make_classify_fn(model, preprocess)
    logits = extract_features(classify, params, test.images, batch_size=batch_size)["logits"]
    return float((logits.argmax(axis=-1) == test.classes).mean())


def make_classify_fn(model: Classifier, preprocess: Callable[[Any], Any]) -> Callable[..., Any]:
    """Returns the jitted `classify(params, uint8 [B, H, W, C])` for {"logits": [B, classes]}."""

    @jax.jit
    def classify(params: Any, images: Num[Array, "B H W C"]) -> dict[str, Any]:
        return {"logits": model.apply({"params": params}, preprocess(images))}

    return classify


def _num_steps(settings: FinetuneSettings, order: BatchOrder) -> int:
    steps = settings.num_epochs * order.steps_per_epoch
    if steps > MAX_NUMBER:
        rule = f"must be at most {MAX_NUMBER} steps, not {steps:g}"
        raise InputError("--finetune_epochs", settings.num_epochs, rule)
    return max(1, round(steps))


def _make_update(
    model: Classifier,
    tx: optax.GradientTransformation,
    settings: FinetuneSettings,
    augment: Augment,
    run_rng: Array,
    steps_per_epoch: int,
) -> Callable[..., FinetuneState]:
    """Returns the jitted `update(state, images, labels)`."""

    @jax.jit
    def update(
        state: FinetuneState, images: Num[Array, "B H W C"], labels: Int[Array, " B"]
    ) -> FinetuneState:
        augment_rng, drop_rng = jax.random.split(jax.random.fold_in(run_rng, state.step))
        pixels = augment(jax.random.split(augment_rng, len(images)), images)
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, settings.num_classes), settings.label_smoothing
        )

        def loss_fn(params: Any) -> Array:
            logits: Any = model.apply({"params": params}, pixels, rngs={"drop_path": drop_rng})
            return jnp.mean(optax.softmax_cross_entropy(logits, targets))

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        begins = state.step % steps_per_epoch == 0
        epoch_loss = jnp.where(begins, 0.0, state.epoch_loss) + loss
        return FinetuneState(state.step + 1, params, opt_state, epoch_loss)

    return update


def _optimizer(
    settings: FinetuneSettings, scales: Any, num_steps: int
) -> optax.GradientTransformation:
    learning_rate_fn = warmup_cosine_schedule(
        settings.learning_rate, warmup_steps=round(0.1 * num_steps), num_steps=num_steps
    )

    def scale_layers(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, s: u * s, updates, scales), state

    adamw = make_optimizer(
        learning_rate_fn=learning_rate_fn,
        weight_decay_fn=lambda _: settings.weight_decay,
        b2=0.98,
        clip_norm=1.0,
    )
    # The whole update of AdamW is proportional to the learning rate, so the layer factor can be
    # applied after it.
    layers = optax.GradientTransformation(lambda params: optax.EmptyState(), scale_layers)
    return optax.chain(adamw, layers)
