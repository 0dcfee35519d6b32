"""Saving and restoring runs. The only module that imports Orbax.

A checkpoint is a folder `checkpoints/<step>/` with three items: `state` (the TrainState),
`window` (metrics accumulated since the last log line) and `meta` (config, versions, scores).
"""

import importlib.metadata
import pathlib
import platform as python_platform

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from hjepa_jax.config import Config
from hjepa_jax.metrics import LogWindow
from hjepa_jax.train_state import TrainState

FORMAT_VERSION = 1
BEST_METRIC = "eval/knn_top1"


class Checkpoints:
    """The checkpoints of one workdir: the newest `keep` and the best by k-NN.

    Args:
      workdir: the run's directory.
      keep: how many of the newest are kept.
      config: the run's config, stored in each checkpoint.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int, config: Config):
        self._config = config.to_dict()
        latest = preservation_policy.LatestN(keep)
        best = preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics[BEST_METRIC],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy([latest, best]),
            ),
            item_names=("state", "window", "meta"),
        )

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, window: LogWindow, *, scores: dict[str, float]) -> None:
        """Starts saving; training may go on (and donate the state) at once.

        Args:
          state: the state to save.
          window: metrics since the last log line.
          scores: evaluation results at this step; with "eval/knn_top1" it may become the best.
        """
        meta = {
            "format_version": FORMAT_VERSION,
            "config": self._config,
            "versions": versions(),
            "scores": scores,
        }
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                window=ocp.args.StandardSave(window),
                meta=ocp.args.JsonSave(meta),
            ),
            metrics={k: float(v) for k, v in scores.items()} if BEST_METRIC in scores else None,
        )

    def restore(
        self, state: TrainState, window: LogWindow, step: int | None = None
    ) -> tuple[TrainState, LogWindow]:
        """Reads a checkpoint (the newest, or that of `step`) into trees like the ones given."""
        as_shapes = lambda tree: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)  # noqa: E731
        restored = self._manager.restore(
            self.latest_step() if step is None else step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(as_shapes(state)),
                window=ocp.args.StandardRestore(as_shapes(window)),
            ),
        )
        return restored["state"], restored["window"]

    def wait(self) -> None:
        """Blocks until the save under way, if any, is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and releases the directory."""
        self._manager.close()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    packages = ("hjepa-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": python_platform.python_version(), **found}
