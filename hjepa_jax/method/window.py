"""What is accumulated on the device between two lines of the log.

CLU metrics are tiny pure structs with `merge` and `compute`; a window of them is carried through
the training step next to the state, so that the host does nothing between logs, and is saved
with it, so that a resumed run writes the same lines.

  window = empty_window(metric_class, batch_size=64, width=192)
  window = update_window(window, scalars, features, step, finite)  # inside jit, every step
  verdict = spread(window, step=100, batch_size=64)                # on the host, every n steps
  values = summarize(window, verdict)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import struct
from jaxtyping import Array, Bool, Float, Int

FEATURE_ROWS = 512


@struct.dataclass
class NonfiniteSteps:
    """Steps of a run whose update was left out because their loss or gradient was not finite.

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


def select(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` where the condition holds, else `old`, for trees of arrays."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


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
