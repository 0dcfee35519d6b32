"""What TensorBoard shows of a run beside its scalars: pictures, distributions, texts."""

import platform as python_platform
import time

import jax
import numpy as np
from jaxtyping import UInt8

from hjepa_jax.config.fields import flatten
from hjepa_jax.evaluation.quality import singular_values
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.method.window import LogWindow, collected_features
from hjepa_jax.reporting.page import table
from hjepa_jax.reporting.snapshot import build_snapshot_fn, fixed_images
from hjepa_jax.runs.logger import RunLogger
from hjepa_jax.runs.run import Run, num_params
from hjepa_jax.runtime.provenance import source_commit, versions

# Of a run's time between its steps.
MAX_SHARE = 0.02
# Seconds that the first pictures are expected to take, most of them to compile.
FIRST_COST_SEC = 10.0


class Budget:
    """What may be spent beside the steps of a run: at most a share of the time so far.

    Args:
      share: fraction of the run's time, in [0, 1].
      first_cost: seconds expected of the first time; later ones are expected to cost what the
        one before did.
    """

    def __init__(self, share: float, first_cost: float):
        self._share, self._next_cost, self._spent = share, first_cost, 0.0

    def allows(self, elapsed: float) -> bool:
        """Whether once more is within the share of the `elapsed` seconds of the run."""
        return self._spent + self._next_cost <= self._share * elapsed

    def spend(self, seconds: float) -> None:
        """Counts what the newest time took."""
        self._spent, self._next_cost = self._spent + seconds, seconds


class Showcase:
    """Shows a few training images, always the same, as the model of the moment sees them.

    It is a program beside the training step, compiled when it is first used. Between steps it may
    take `MAX_SHARE` of the run's time, and is left out where that is not enough; after the last
    step, when there is none to be slowed, it always shows.

    Args:
      run: the run.
      images: its training images.
      logger: where to show.
    """

    def __init__(self, run: Run, images: UInt8[np.ndarray, "n H W C"], logger: RunLogger):
        self._run, self._images, self._logger = run, fixed_images(images), logger
        self._snapshot = jax.jit(build_snapshot_fn(run.config, run.model))
        self._budget, self._started = Budget(MAX_SHARE, FIRST_COST_SEC), time.perf_counter()

    def introduce(self, state: TrainState) -> None:
        """The configuration as hparams and text, the parameters, the environment."""
        if not self._logger.tensorboard:
            return
        fields = flatten(self._run.config.to_dict())
        self._logger.hparams(
            {k: v if isinstance(v, int | float | str) else str(v) for k, v in fields.items()}
        )
        parts = {**state.params, "target encoder": state.target_params}
        leaves = [
            (name + jax.tree_util.keystr(path), str(leaf.shape), f"{leaf.size:,}")
            for name, tree in parts.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        ]
        sizes = [(name, "", f"{num_params(tree):,}") for name, tree in parts.items()]
        where = {
            **versions(),
            "commit": source_commit(),
            "platform": python_platform.platform(),
            "devices": ", ".join(map(str, jax.devices())),
        }
        self._logger.texts(
            0,
            {
                "config": table(["field", "value"], list(fields.items())),
                "parameters": table(["part", "shape", "parameters"], sizes + leaves),
                "environment": table(["", "version"], list(where.items())),
            },
        )

    def can_show(self, step: int) -> bool:
        """Whether the run can afford pictures at this step; the last step always can."""
        last = step == self._run.schedules.num_steps
        return last or self._budget.allows(time.perf_counter() - self._started)

    def show(self, state: TrainState, window: LogWindow) -> None:
        """Pictures, spectrum and histogram; `can_show` says when.

        Args:
          state: its parameters are on this process's first device.
          window: the newest target features.
        """
        began = time.perf_counter()
        self._show(state, window, int(state.step))
        self._budget.spend(time.perf_counter() - began)

    def _show(self, state: TrainState, window: LogWindow, step: int) -> None:
        """Pictures of masks, features, predictions and attention; spectrum and histogram."""
        from hjepa_jax.reporting import figures, image_figures  # matplotlib takes its time to load

        snapshot = self._snapshot(state.params, state.target_params, self._images)
        snapshot = jax.device_get(snapshot)
        drawn = image_figures.snapshot_figures(snapshot)
        batch_size = self._run.config.train.batch_size
        features = collected_features(window, step=step, batch_size=batch_size)
        if len(features) > 1:
            drawn["spectrum"] = figures.spectrum({"target": singular_values(features)})
            self._logger.histograms(step, {"features/target": features})
        self._logger.images(
            step, {f"figures/{name}": figures.pixels(figure) for name, figure in drawn.items()}
        )
        self._logger.flush()  # what they cost is paid and counted here, not beside the next steps
