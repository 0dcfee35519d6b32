"""What is accumulated on the device between two lines of the log.

CLU metrics are tiny pure structs with `merge` and `compute`; a window of them is carried through
the training step next to the state, so that the host does nothing between logs, and is saved
with it, so that a resumed run writes the same lines.

  window = empty_window(metric_class, feature_rows=512, width=192)
  window = update_window(window, scalars, features, step)      # inside jit, every step
  values = summarize(window, step)                             # on the host, every n steps
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import struct
from jaxtyping import Array, Float, Int

from hjepa_jax.evaluation.quality import effective_rank

FEATURE_ROWS = 512


@struct.dataclass
class LogWindow:
    """Running means since the last log line, and the newest target features.

    Attributes:
      averages: a CLU collection of means over the steps of the window.
      features: float32 [F, D], mean-pooled target features of the newest F images.
    """

    averages: Any
    features: Any


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
    return LogWindow(
        averages=averages.empty(),
        features=jnp.zeros((rows * (FEATURE_ROWS // rows), width), jnp.float32),
    )


def update_window(
    window: LogWindow,
    scalars: dict[str, Float[Array, ""]],
    features: Float[Array, "B D"],
    step: Int[Array, ""],
) -> LogWindow:
    """Merges the outputs of one step.

    Args:
      window: the window so far.
      scalars: the step's value of every metric of the collection.
      features: one feature vector per image; the newest overwrite the oldest.
      step: updates done before this one.
    """
    rows = min(len(features), FEATURE_ROWS)
    slot = step % (len(window.features) // rows)
    return LogWindow(
        averages=window.averages.merge(window.averages.single_from_model_output(**scalars)),
        features=jax.lax.dynamic_update_slice(window.features, features[:rows], (slot * rows, 0)),
    )


def reset_averages(window: LogWindow) -> LogWindow:
    """The window after a log line: means start anew, features stay."""
    return LogWindow(averages=type(window.averages).empty(), features=window.features)


def summarize(window: LogWindow, *, step: int, batch_size: int) -> dict[str, float]:
    """The window's means by name, and `effective_rank` of the features collected.

    The rank is computed on the host (Apple's plugins have no SVD), from at most 512 images; it
    cannot exceed their number.
    """
    values = {name: float(value) for name, value in window.averages.compute().items()}
    num_collected = min(step * batch_size, len(window.features))
    features = np.asarray(window.features)[:num_collected]
    finite = bool(np.isfinite(features).all())
    values["effective_rank"] = effective_rank(features) if finite else math.nan
    return values
