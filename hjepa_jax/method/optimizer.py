"""Schedules, the weight-decay mask, and the optax chain.

All schedules are functions of the number of the update, counted from 1: update number s uses
`learning_rate_fn(s)`. So the first update of a warm-up already moves, and the log line of step 50
shows the learning rate of step 50. After k skipped non-finite steps, step s uses the rate of update
s - k, because optax does not count skipped steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from hjepa_jax.method.muon import scale_by_muon
from hjepa_jax.models.matmul import FLOAT32, Precision

Schedule = Callable[[Any], Any]

# Last path component of the parameters without weight decay: biases, norm scales, tokens,
# positions, and the matrices of the pyramid, which start as the identity.
UNDECAYED = (
    "bias",
    "scale",
    "embedding",
    "mixing",
    "mask_token",
    "level_tokens",
    "summary_tokens",
    "register_tokens",
)


@struct.dataclass
class WarmupCosine:
    """See `warmup_cosine_schedule`. Fields are arrays, so that they can be program arguments.

    Inverses are computed once on the host, because XLA does the same with constants. So a program
    that has these numbers as constants gives the same values, bit for bit.
    """

    peak: Any
    warmup_steps: Any
    slope: Any  # increase per step of the warm-up
    begin: Any  # step at which the cosine begins
    inverse_length: Any  # 1 / length of the cosine in steps
    end: Any
    half: Any  # half of the height of the cosine

    def __call__(self, step: Any) -> Any:
        """Returns the value at a step."""
        step = jnp.asarray(step, jnp.float32)
        progress = (step - self.begin) * self.inverse_length
        cosine = _cosine(self.peak, self.half, self.end, progress)
        return jnp.where(step < self.warmup_steps, step * self.slope, cosine)


@struct.dataclass
class Interpolation:
    """See `interpolation_schedule`. All fields but `kind` are arrays, as in `WarmupCosine`."""

    start: Any
    end: Any
    half: Any  # half of start - end, or end - start if linear
    inverse_steps: Any
    kind: str = struct.field(pytree_node=False)

    def __call__(self, step: Any) -> Any:
        """Returns the value at a step."""
        progress = jnp.asarray(step, jnp.float32) * self.inverse_steps
        if self.kind == "constant":
            return jnp.zeros_like(progress) + self.start
        if self.kind == "cosine":
            return _cosine(self.start, self.half, self.end, progress)
        return self.start + self.half * jnp.clip(progress, 0.0, 1.0)


def warmup_cosine_schedule(
    peak: float,
    *,
    warmup_steps: int,
    num_steps: int,
    end: float = 0.0,
    decay_steps: int | None = None,
) -> WarmupCosine:
    """Linear from 0 to `peak` over `warmup_steps`, then constant, then half a cosine to `end`.

    Args:
      peak: value at step `warmup_steps`.
      warmup_steps: at least 0; may exceed `num_steps` (a run cut short in its warm-up).
      num_steps: step at which `end` is reached.
      end: final value.
      decay_steps: length of the cosine; the value is `peak` before it. At most, and by default
        (None), all steps after the warm-up.
    """
    longest = max(num_steps - warmup_steps, 0)
    length = longest if decay_steps is None else min(decay_steps, longest)
    slope = np.float32(peak) * _inverse(warmup_steps)
    numbers = (peak, warmup_steps, slope, num_steps - length, _inverse(length), end)
    return WarmupCosine(*map(np.float32, (*numbers, (peak - end) * 0.5)))


def interpolation_schedule(start: float, end: float, *, kind: str, num_steps: int) -> Interpolation:
    """From `start` to `end` over `num_steps`: "constant" (stays at start), "linear" or "cosine".

    Raises:
      ValueError: for another `kind`.
    """
    if kind not in ("constant", "linear", "cosine"):
        raise ValueError(f"kind={kind!r}: must be constant, linear or cosine")
    half = end - start if kind == "linear" else (start - end) * 0.5
    return Interpolation(*map(np.float32, (start, end, half, _inverse(num_steps))), kind=kind)


def _inverse(steps: int) -> np.float32:
    return np.float32(1.0) / np.float32(max(steps, 1))


def _cosine(start: Any, half: Any, end: Any, progress: Any) -> Any:
    value = end + half * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    return jnp.where(progress > 0.0, value, start)  # exactly `start`, without rounding


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: the kernels of Dense layers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def muon_mask(params: Any) -> Any:
    """True for the leaves that Muon updates: the kernels that map features to features.

    False for tokens, vectors and the patch embedding, which maps pixels.
    """

    def is_hidden(path: Any, leaf: Any) -> bool:
        names = [key.key for key in path]
        return names[-1] == "kernel" and leaf.ndim == 2 and "patch_embedding" not in names

    return jax.tree_util.tree_map_with_path(is_hidden, params)


def make_optimizer(
    *,
    learning_rate_fn: Schedule,
    weight_decay_fn: Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    clip_norm: float | None = None,
    muon_momentum: float | None = None,
    muon_precision: Precision = FLOAT32,
) -> optax.GradientTransformation:
    """AdamW with scheduled learning rate and weight decay, after clipping by global norm.

    Args:
      learning_rate_fn: learning rate by number of the update, from 1.
      weight_decay_fn: weight decay by number of the update; decoupled, multiplied by the learning
        rate.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      clip_norm: largest global gradient norm; None = no clipping.
      muon_momentum: momentum of Muon, which replaces Adam for the matrices of `muon_mask`, with
        the same learning rate and weight decay. None = Adam everywhere.
      muon_precision: precision of Muon's matrix products.

    References:
      Loshchilov, Hutter 2019, arXiv 1711.05101, algorithm 2 (AdamW).
    """
    # optax can schedule the weight decay only through inject_hyperparams.
    schedules = {
        "learning_rate": lambda count: learning_rate_fn(count + 1),
        "weight_decay": lambda count: weight_decay_fn(count + 1),
    }
    if muon_momentum is None:
        adamw = optax.inject_hyperparams(optax.adamw, static_args=("mask",))
        optimizer = adamw(**schedules, b1=b1, b2=b2, mask=decay_mask)
    else:
        optimizer = optax.inject_hyperparams(_decoupled, static_args=("direction",))(
            **schedules,
            direction=_muon_and_adam(b1, b2, scale_by_muon(muon_momentum, muon_precision)),
        )
    if clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def _decoupled(
    learning_rate: Any, weight_decay: Any, direction: optax.GradientTransformation
) -> optax.GradientTransformation:
    """-learning_rate * (direction + weight_decay * parameter)."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _muon_and_adam(
    b1: float, b2: float, muon: optax.GradientTransformation
) -> optax.GradientTransformation:
    def labels(params: Any) -> Any:
        return jax.tree.map(lambda hidden: "muon" if hidden else "adam", muon_mask(params))

    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(b1, b2)}, labels)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves. The function of optax has moved between its versions."""
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))
