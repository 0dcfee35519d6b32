"""Saving and restoring runs. The only module that imports Orbax.

A checkpoint is a folder `checkpoints/<step>/` with three items: `state` (the TrainState),
`window` (metrics accumulated since the last log line) and `meta` (config, versions, scores).
"""

import importlib.metadata
import pathlib
import platform as python_platform
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from hjepa_jax import build
from hjepa_jax.config import Config
from hjepa_jax.errors import InputError
from hjepa_jax.metrics import LogWindow
from hjepa_jax.models.hjepa import HJEPA
from hjepa_jax.run import load_config
from hjepa_jax.train_state import TrainState

FORMAT_VERSION = 1
BEST_METRIC = "eval/knn_top1"


class Checkpoints:
    """The checkpoints of one workdir: the newest few and the best by k-NN.

    Args:
      workdir: the run's directory.
      config: the run's config, stored in each checkpoint; its `train.keep_checkpoints` says how
        many of the newest are kept.
    """

    def __init__(self, workdir: pathlib.Path, *, config: Config):
        self._workdir, self._config = workdir, config.to_dict()
        latest = preservation_policy.LatestN(config.train.keep_checkpoints)
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

    def find_step(self, which: str) -> int | None:
        """The checkpoint that `which` names: "last" (None: the newest), "best" or a number.

        Raises:
          InputError: when it names none ("--step").
        """
        if which == "last":
            return None
        if which == "best":
            meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
            scores = {
                step: self._manager.restore(step, args=meta)["meta"]["scores"].get(BEST_METRIC)
                for step in self._manager.all_steps()
            }
            scored = {step: score for step, score in scores.items() if score is not None}
            if not scored:
                rule = "needs a checkpoint with a k-NN score (eval.every_epochs)"
                raise InputError("--step", which, rule)
            return max(scored, key=scored.__getitem__)
        if not which.isdecimal():
            raise InputError("--step", which, "must be last, best or the step of a checkpoint")
        return int(which)

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

    def restore(self, state: TrainState, window: LogWindow) -> tuple[TrainState, LogWindow]:
        """Reads the newest checkpoint into trees like the ones given.

        Raises:
          InputError: when there is none.
        """
        restored = self._restore(None, state=state, window=window)
        return restored["state"], restored["window"]

    def restore_state(self, state: TrainState, step: int | None = None) -> TrainState:
        """Reads the state alone, of the newest checkpoint or of the one at `step`.

        Raises:
          InputError: when there is no such checkpoint.
        """
        return self._restore(step, state=state)["state"]

    def _restore(self, step: int | None, **templates: Any) -> Any:
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise InputError("--workdir", str(self._workdir), "holds no checkpoint yet")
        if step is not None and step not in steps:
            raise InputError("--step", step, f"must be one of the checkpoints, {steps}")
        args = {
            name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
            for name, tree in templates.items()
        }
        return self._manager.restore(
            steps[-1] if step is None else step, args=ocp.args.Composite(**args)
        )

    def wait(self) -> None:
        """Blocks until the save under way, if any, is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and releases the directory."""
        self._manager.close()


class NewestCheckpoint:
    """Keeps the newest of a succession of trees, for work that is to survive an interruption.

    Args:
      directory: made at once.
    """

    def __init__(self, directory: pathlib.Path):
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )

    def restore(self, state: Any) -> Any:
        """The newest tree, like `state`; `state` itself where nothing was saved."""
        step = self._manager.latest_step()
        if step is None:
            return state
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._manager.restore(step, args=ocp.args.StandardRestore(template))

    def save(self, step: int, state: Any) -> None:
        """Starts saving `state`; what was kept before goes when it is on disk."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Waits for the save under way and releases the directory."""
        self._manager.close()


def load_encoder(workdir: str | pathlib.Path, step: int | None = None) -> tuple[HJEPA, Any]:
    """The model of a run and the parameters of its target encoder.

      model, params = checkpoint.load_encoder("runs/cifar10_tiny")
      embed = build.build_embed_fn(run.load_config("runs/cifar10_tiny"), model)
      features = embed(params, images)["level_0"]  # uint8 [B, H, W, 3] -> float32 [B, D]

    Args:
      workdir: the run's directory. The data set it was trained on is not needed.
      step: which checkpoint; None for the newest.

    Raises:
      InputError: when the directory holds no run or no such checkpoint.
    """
    which = "last" if step is None else str(step)
    model, state, _ = load_state(pathlib.Path(workdir), which)
    return model, state.target_params


def load_state(workdir: pathlib.Path, which: str = "last") -> tuple[HJEPA, TrainState, TrainState]:
    """The model of a run, its state at a checkpoint, and its state at step 0.

    Args:
      workdir: the run's directory. The data set it was trained on is not needed.
      which: "last", "best" (by k-NN) or the step of a checkpoint.

    Raises:
      InputError: when the directory holds no run or no such checkpoint.
    """
    config = load_config(workdir)
    model = build.build_model(config)
    # Schedules decide no shape, so any length will do.
    tx = build.build_optimizer(config, build.build_schedules(config, config.train.batch_size))
    initial = jax.jit(build.build_create_state(config, model, tx))()
    checkpoints = Checkpoints(workdir, config=config)
    try:
        return model, checkpoints.restore_state(initial, checkpoints.find_step(which)), initial
    finally:
        checkpoints.close()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    packages = ("hjepa-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": python_platform.python_version(), **found}
