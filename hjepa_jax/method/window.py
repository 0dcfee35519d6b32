"""Metrics that are accumulated on the device between two log lines, and the steps between them.

CLU metrics are tiny pure structs with `merge` and `compute`; a window of them is carried through
the training step next to the state, so that the host does nothing between logs, and is saved
with it, so that a resumed run writes the same lines.

  window = empty_window(metric_class, batch_size=64, width=192)
  window = update_window(window, scalars, features, step, finite)  # inside jit, every step
  verdict = spread(window, step=100, batch_size=64)                # on the host, every n steps
  values = summarize(window, verdict)
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
      count: int32 [], how many, over the whole run.
      newest: int32 [], number of the newest of them, from 1; 0 for none.
      terms: bool [S], which scalars, in the order of their names, were not finite then.
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
      nonfinite: the steps that were not.
    """

    averages: Any
    features: Any
    nonfinite: Any


def make_averages(names: list[str]) -> type[clu_metrics.Collection]:
    """A CLU collection that averages each of the named scalars over steps."""
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
    """Merges the outputs of one step; of a step that is not finite, only that it was not.

    Args:
      window: the window so far.
      scalars: the step's value of every metric of the collection.
      features: one feature vector per image; the newest overwrite the oldest.
      step: steps done before this one.
      finite: whether the step's loss and gradient are.
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
    """The window after a log line: means start anew, features stay."""
    return dataclasses.replace(window, averages=type(window.averages).empty())


def collected_features(
    window: LogWindow, *, step: int, batch_size: int
) -> Float[np.ndarray, "n D"]:
    """The target features that the window holds after `step` steps, at most 512, on the host."""
    return np.asarray(window.features)[: step * batch_size]


def nonfinite_terms(window: LogWindow) -> list[str]:
    """Names of the scalars that were not finite in the newest step that was not."""
    names = sorted(window.averages.compute())
    return [name for name, bad in zip(names, window.nonfinite.terms, strict=True) if bad]


def make_run_steps(train_step: TrainStep) -> Callable[..., tuple[TrainState, LogWindow]]:
    """Returns a function that makes up to S updates in one program.

    The result is `run_steps(state, window, images, index, count)`. It takes the whole training set
    (uint8 [n, H, W, C]), the rows of each batch (int32 [S, B]) and how many of the S batches to
    run. This number may change from call to call without a new compilation. If the training set is
    not on the device, the function takes the batches themselves, uint8 [S, B, H, W, C], and None
    for the index. With gradient accumulation, B stands for two axes: parts, and images of a part.
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
