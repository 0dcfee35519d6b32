"""Metrics that are accumulated on the device between two log lines, and the steps between them.

CLU metrics are tiny pure structs with `merge` and `compute`. A window of them is carried through
the training step next to the state, so that the host does nothing between logs. It is saved with
the state, so that a resumed run writes the same log lines.

  window = empty_window(make_averages(names), batch_size=64, width=192)
  window = update_window(window, scalars, features, step, finite)  # inside jit, every step
  window = reset_averages(window)                                  # on the host, after a log line
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num

from hjepa_jax.method.step import TrainStep
from hjepa_jax.method.train_state import TrainState, select

FEATURE_ROWS = 512


@struct.dataclass
class NonfiniteSteps:
    """Steps without an update, because their loss or gradient was not finite.

    Attributes:
      count: int32 [], number of these steps over the whole run.
      newest: int32 [], step number of the newest of them, from 1; 0 = none.
      terms: bool [S], which scalars, sorted by name, were not finite in that step.
    """

    count: Any
    newest: Any
    terms: Any


@struct.dataclass
class LogWindow:
    """Running means since the last log line, and the newest target features.

    Attributes:
      averages: a CLU collection of means over the finite steps of the window.
      features: float32 [F, D], mean-pooled target features of the newest F images.
      nonfinite: the steps whose loss or gradient was not finite.
    """

    averages: Any
    features: Any
    nonfinite: Any


def make_averages(names: list[str]) -> type[clu_metrics.Collection]:
    """Returns a CLU collection that averages each of the named scalars over steps."""
    return clu_metrics.Collection.create(
        **{name: clu_metrics.Average.from_output(name) for name in names}
    )


def empty_window(
    averages: type[clu_metrics.Collection], *, batch_size: int, width: int
) -> LogWindow:
    """A window before its first step, for batches of `batch_size` and features of `width`."""
    rows = min(batch_size, FEATURE_ROWS)
    num_terms = len(averages.empty().compute())
    return LogWindow(
        averages=averages.empty(),
        features=jnp.zeros((rows * (FEATURE_ROWS // rows), width), jnp.float32),
        nonfinite=NonfiniteSteps(
            count=jnp.zeros((), jnp.int32),
            newest=jnp.zeros((), jnp.int32),
            terms=jnp.zeros((num_terms,), bool),
        ),
    )


def update_window(
    window: LogWindow,
    scalars: dict[str, Float[Array, ""]],
    features: Float[Array, "B D"],
    step: Int[Array, ""],
    finite: Bool[Array, ""],
) -> LogWindow:
    """Merges the outputs of one step. A non-finite step changes only `nonfinite`.

    Args:
      window: the window so far.
      scalars: the step's value of every metric of the collection.
      features: one feature vector per image; the newest overwrite the oldest.
      step: steps done before this one.
      finite: whether the loss and the gradient of the step are finite.
    """
    rows = min(len(features), FEATURE_ROWS)
    slot = step % (len(window.features) // rows)
    averages = window.averages.merge(window.averages.single_from_model_output(**scalars))
    newest = jax.lax.dynamic_update_slice(window.features, features[:rows], (slot * rows, 0))
    terms = jnp.stack([~jnp.isfinite(scalars[name]) for name in sorted(scalars)])
    old = window.nonfinite
    return LogWindow(
        averages=select(finite, averages, window.averages),
        features=jnp.where(finite, newest, window.features),
        nonfinite=NonfiniteSteps(
            count=old.count + ~finite,
            newest=jnp.where(finite, old.newest, step + 1),
            terms=jnp.where(finite, old.terms, terms),
        ),
    )


def reset_averages(window: LogWindow) -> LogWindow:
    """The window after a log line: empty means, the same features."""
    return dataclasses.replace(window, averages=type(window.averages).empty())


def collected_features(
    window: LogWindow, *, step: int, batch_size: int
) -> Float[np.ndarray, "n D"]:
    """The target features in the window after `step` steps, at most 512 rows, on the host."""
    return np.asarray(window.features)[: step * batch_size]


def nonfinite_terms(window: LogWindow) -> list[str]:
    """Names of the scalars that were not finite in the newest non-finite step."""
    names = sorted(window.averages.compute())
    return [name for name, bad in zip(names, window.nonfinite.terms, strict=True) if bad]


def make_run_steps(train_step: TrainStep) -> Callable[..., tuple[TrainState, LogWindow]]:
    """Returns a function that makes up to S updates in one program.

    The function is `run_steps(state, window, images, index, count)`. Its arguments are the whole
    training set (uint8 [n, H, W, C]), the rows of each batch (int32 [S, B]) and the number of
    batches to run, at most S. This number may change from call to call without a new compilation.
    If the training set is not on the device, `images` are the batches themselves, uint8
    [S, B, H, W, C], and `index` is None. With gradient accumulation, B stands for two axes: parts,
    and images of a part.
    """

    def run_steps(
        state: TrainState,
        window: LogWindow,
        images: Num[Array, "... H W C"],
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
        if num_batches == 1:  # a loop in the program would repeat nothing
            return body(0, (state, window))
        return jax.lax.fori_loop(0, count, body, (state, window))

    return run_steps
