"""Trains the run that a config describes.

python -m hjepa_jax.main --config=configs/shapes_tiny.py [--workdir=DIR] [--dry_run]
  [--config.optim.learning_rate=1e-3 ...]
  [--coordinator=auto | --coordinator=HOST:PORT --num_processes=2 --process_id=0]
"""

import json
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from hjepa_jax import cli
from hjepa_jax.errors import InputError, Interrupted

try:
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
except flags.Error as unreadable:  # a --flagfile, which it reads at once
    cli.fail(str(unreadable))
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory (runs/<config name>).")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build, print sizes as JSON, write nothing.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, of several; auto: as SLURM, Open MPI or Kubernetes.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is.", lower_bound=0)
flags.mark_flag_as_required("config")


def main() -> None:
    """Runs the command."""
    path, config = config_flags.get_config_filename(flags.FLAGS["config"]), _CONFIG.value
    try:
        config.to_dict()
    except OSError as error:  # config_flags reports a file that it could not load on first use
        reason = str(error.__cause__ or error).strip().splitlines()[-1].strip()
        raise InputError("--config", path, f"must be a config file ({reason})") from error

    from hjepa_jax import cluster, run, train  # here, so that a bad flag is refused at once

    if _DRY_RUN.value:
        print(json.dumps(run.describe(config)))
        return
    workdir = pathlib.Path(_WORKDIR.value or f"runs/{cli.config_name(path)}")
    try:
        with cluster.member(
            _COORDINATOR.value, num_processes=_NUM_PROCESSES.value, process_id=_PROCESS_ID.value
        ):
            train.train_and_evaluate(config, workdir)
    except Interrupted as stop:
        print(f"{stop}: saved in {workdir}; run the same command to go on", file=sys.stderr)
        sys.exit(stop.status)
    if cluster.is_first():
        print(summary(workdir))


def summary(workdir: pathlib.Path) -> str:
    """Where everything of a run is, and the commands to look at it."""
    from hjepa_jax.evaluation.results import format_best, read_probe_json, rows_on
    from hjepa_jax.logging import summary_box
    from hjepa_jax.run_dir import load_config

    config, lines = load_config(workdir), {}
    rows = rows_on(config.data.source, read_probe_json(workdir / "probe.json"))
    for protocol in ("linear", "knn"):
        if best := format_best(rows, protocol):
            lines[f"best {protocol}"] = best
    if (workdir / "report.html").exists():
        lines["report"] = str(workdir / "report.html")
    if config.log.tensorboard:
        lines["curves"] = f"tensorboard --logdir {workdir}"
    lines["judge"] = f"python -m hjepa_jax.probe --workdir={workdir}"
    lines["features"] = f"python -m hjepa_jax.embed --workdir={workdir} --input=... --output=..."
    return summary_box(f"done: {workdir}", lines)


if __name__ == "__main__":
    cli.run(main)
