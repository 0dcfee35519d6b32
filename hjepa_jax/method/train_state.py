"""The training state: everything that a step reads and writes, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float


@struct.dataclass
class TrainState:
    """Everything that a run must save to resume exactly.

    Attributes:
      step: int32 [], steps done; a skipped update counts.
      params: online parameters, {"context_encoder": ..., "predictor": ...} and, if the loss
        compares views, "projection"; float32.
      target_params: EMA of params["context_encoder"]; with `model.target=online` a plain copy.
      opt_state: state of the optax transformation.
      rng: uint32 [2], the run's key; step s uses fold_in(rng, s).
    """

    step: Any
    params: Any
    target_params: Any
    opt_state: Any
    rng: Any

    spread_moment = None  # a field of `MomentState` only


@struct.dataclass
class MomentState(TrainState):
    """A state with the running second moment of the projections (`loss.spread_moment`).

    A separate class, so that states without this moment and their checkpoints keep their format.

    Attributes:
      spread_moment: float32 [K, K].
    """

    spread_moment: Any = None


def create_train_state(
    params: Any,
    tx: optax.GradientTransformation,
    rng: jax.Array,
    *,
    moment_width: int | None = None,
) -> TrainState:
    """A fresh state at step 0; the target encoder is a copy of the context encoder.

    Args:
      params: online parameters.
      tx: optax transformation.
      rng: the run's key.
      moment_width: K, width of the projections; the state then carries their running second
        moment, which starts at I / K (evenly spread directions). None = no moment.
    """
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A real copy: an aliased tree could not be donated.
        target_params=jax.tree.map(jnp.copy, params["context_encoder"]),
        opt_state=tx.init(params),
        rng=rng,
    )
    if moment_width is None:
        return state
    return MomentState(**vars(state), spread_moment=jnp.eye(moment_width) / moment_width)


def ema_update(target_params: Any, params: Any, ema_momentum: jax.Array | float) -> Any:
    """Target = m * target + (1 - m) * params, leaf by leaf, m in [0, 1]."""
    m = ema_momentum
    return jax.tree.map(lambda t, p: m * t + (1.0 - m) * p, target_params, params)


def with_moment(state: TrainState, moment: Float[Array, "K K"] | None) -> TrainState:
    """The state with another running moment, if it carries one."""
    return state if moment is None else dataclasses.replace(state, spread_moment=moment)


def select(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` if the condition holds, else `old`, for trees of arrays."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
