"""Pictures, histograms and texts of a run for TensorBoard, in addition to its scalars."""

import platform as python_platform
import time

import jax
import numpy as np
from jaxtyping import Num

from hjepa_jax.config import base_config
from hjepa_jax.config.fields import flatten
from hjepa_jax.evaluation.quality import singular_values
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.method.window import LogWindow, collected_features
from hjepa_jax.reporting.page import table
from hjepa_jax.reporting.snapshot import build_snapshot_fn, fixed_images
from hjepa_jax.runs.logger import RunLogger
from hjepa_jax.runs.run import Run, num_params
from hjepa_jax.runtime.provenance import source_commit, versions

MAX_SHARE = 0.02  # largest fraction of a run's time that pictures may take
FIRST_COST_SEC = 10.0  # expected time of the first pictures, mostly for compilation


# Meaning of the curves, by the name before a level or the name of a loss term.
CURVES = {
    "eval/knn_top1, knn_top1_<features>": "k-NN of held-out images, by the labels",
    "eval/linear_top1, linear_top1_<level>": "linear probe on the test images after the last step",
    "probe/": "best score of each encoder on the test images, chosen on held-out images",
    "train/loss": "weighted sum of all terms; falls also when all features become alike",
    "train/loss_<term>": "a term before its weight; the spread as a multiple of its floor",
    "train/effective_rank": "directions that the target features use; low is a collapse",
    "train/relative_std": "spread of the target features over their length; near 0 is a collapse",
    "train/target_std, context_std": "how far images differ; near 0 all are one point",
    "train/pred_target_cosine": "how well hidden patches are predicted; near 1 is too easy",
    "train/explained_variance_<level>": "prediction: 0 is no better than the mean, 1 is perfect",
    "train/position_share": "share of the targets' variance that the place of a patch decides",
    "train/image_share": "share of the targets' variance that the image decides",
    "train/num_targets_<level>": "targets per image",
    "train/learning_rate, weight_decay, ema_momentum": "schedules",
    "train/grad_norm, update_norm, param_norm": "Euclidean norms over all parameters",
    "train/nonfinite_steps": "steps left out so far, because loss or gradient was not finite",
    "perf/images_per_sec, steps_per_sec": "speed without evaluation, saving and pictures",
    "perf/data_wait_fraction": "share of the time in which the device waits for images",
    "perf/peak_memory_bytes": "of the device; on a CPU, of the process",
}


class Budget:
    """Limits the time that a run spends between its steps to a share of its total time.

    Args:
      share: fraction of the run's time, in [0, 1].
      first_cost: expected seconds of the first use; a later use is expected to cost as much as the
        last one.
    """

    def __init__(self, share: float, first_cost: float):
        self._share, self._next_cost, self._spent = share, first_cost, 0.0

    def allows(self, elapsed: float) -> bool:
        """Returns whether one more use stays within the share of the `elapsed` seconds."""
        return self._spent + self._next_cost <= self._share * elapsed

    def spend(self, seconds: float) -> None:
        """Adds the seconds of the last use."""
        self._spent, self._next_cost = self._spent + seconds, seconds


class Showcase:
    """Shows the current model on a few fixed training images.

    Its program is separate from the training step, and compiled on first use. Between steps,
    pictures may take `MAX_SHARE` of the time of the run; more are skipped. The last step always
    shows pictures.

    Args:
      run: the run.
      images: its training images.
      logger: receives the pictures.
      name: name of the trial in the HPARAMS tab; trials with one name are averaged.
    """

    def __init__(
        self, run: Run, images: Num[np.ndarray, "n H W C"], logger: RunLogger, *, name: str
    ):
        self._name, self._run, self._logger = name, run, logger
        self._images = fixed_images(images)
        self._snapshot = jax.jit(build_snapshot_fn(run.config, run.model))
        self._budget, self._started = Budget(MAX_SHARE, FIRST_COST_SEC), time.perf_counter()

    def introduce(self, state: TrainState) -> None:
        """Logs the fields that differ from the defaults as hparams, and texts.

        The texts are the meaning of the curves, the configuration, the parameters and the
        environment.
        """
        if not self._logger.tensorboard:
            return
        fields, defaults = (flatten(c.to_dict()) for c in (self._run.config, base_config()))
        changed = {k: v for k, v in fields.items() if v != defaults[k]}
        self._logger.hparams(
            self._name,
            {k: v if isinstance(v, int | float | str) else str(v) for k, v in changed.items()},
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
                "curves": table(["curve", "meaning"], list(CURVES.items())),
                "config": table(["field", "value"], list(fields.items())),
                "parameters": table(["part", "shape", "parameters"], sizes + leaves),
                "environment": table(["", "version"], list(where.items())),
            },
        )

    def can_show(self, step: int) -> bool:
        """Returns whether the run has time for pictures at this step; always at the last step."""
        last = step == self._run.schedules.num_steps
        return last or self._budget.allows(time.perf_counter() - self._started)

    def show(self, state: TrainState, window: LogWindow) -> None:
        """Logs pictures, spectrum and histogram; call it if `can_show` allows.

        Args:
          state: parameters on the first device of this process.
          window: newest target features.
        """
        began = time.perf_counter()
        self._show(state, window, int(state.step))
        self._budget.spend(time.perf_counter() - began)

    def _show(self, state: TrainState, window: LogWindow, step: int) -> None:
        """Logs pictures of masks, features, predictions and attention; spectrum and histogram."""
        from hjepa_jax.reporting import figures, image_figures  # matplotlib is slow to import

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
        self._logger.flush()  # so that the budget includes the time to encode the pictures
