"""Trains the run that a config describes.

python -m hjepa_jax.main --config=configs/shapes_tiny.py [--workdir=DIR] [--dry_run]
  [--config.optim.learning_rate=1e-3 ...]
"""

import json
import pathlib
import signal
import sys

from absl import flags
from ml_collections import config_flags

from hjepa_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory (runs/<config name>).")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build, print sizes as JSON, write nothing.")
flags.mark_flag_as_required("config")


def main() -> None:
    """Runs the command."""
    from hjepa_jax import run, train  # here, so that a bad flag is refused at once

    if _DRY_RUN.value:
        print(json.dumps(run.describe(_CONFIG.value)))
        return
    name = cli.config_name(config_flags.get_config_filename(flags.FLAGS["config"]))
    workdir = pathlib.Path(_WORKDIR.value or f"runs/{name}")
    try:
        train.train_and_evaluate(_CONFIG.value, workdir)
    except train.Interrupted as stop:
        print(f"{stop}: saved in {workdir}; run the same command to go on", file=sys.stderr)
        sys.exit(128 + signal.Signals(stop.signum))
    print(f"done: {workdir}  (tensorboard --logdir {workdir})")


if __name__ == "__main__":
    cli.run(main)
