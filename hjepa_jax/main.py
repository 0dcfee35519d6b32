"""Trains the run that a config describes.

python -m hjepa_jax.main --config=configs/shapes_tiny.py [--workdir=DIR]
  [--dry_run [--json]] [--config.optim.learning_rate=1e-3 ...]
  [--coordinator=auto |
   --coordinator=HOST:PORT --num_processes=2 --process_id=0]
"""

import json
import pathlib
import shlex
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from hjepa_jax import cli
from hjepa_jax.command_line import config_path_of
from hjepa_jax.errors import Interrupted
from hjepa_jax.runtime.paths import local_path

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory (runs/<config name>).")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print sizes; train and write nothing.")
_JSON = flags.DEFINE_bool("json", False, "With --dry_run: print one JSON object.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0 of several; auto: ask SLURM, Open MPI or Kubernetes.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0.", lower_bound=0
)


def main() -> None:
    """Runs the command."""
    config = _CONFIG.value
    path = config_path_of(config_flags.get_config_filename(flags.FLAGS["config"]))
    default = f"runs/{cli.config_name(path)}"
    workdir = local_path("--workdir", default if _WORKDIR.value is None else _WORKDIR.value)

    from hjepa_jax.data.class_list import resolve_class_list
    from hjepa_jax.runs import run
    from hjepa_jax.runtime import cluster
    from hjepa_jax.training import train

    resolve_class_list(config, path)
    if _DRY_RUN.value:
        sizes = run.describe(config)
        print(json.dumps(sizes) if _JSON.value else dry_table(sizes))
        return
    try:
        with cluster.member(
            _COORDINATOR.value, num_processes=_NUM_PROCESSES.value, process_id=_PROCESS_ID.value
        ):
            train.train_and_evaluate(config, workdir)
    except Interrupted as stop:
        where = shlex.quote(str(workdir))
        print(f"{stop}: saved in {where}; run the same command to go on", file=sys.stderr)
        sys.exit(stop.status)
    if cluster.is_first():
        print(summary(workdir))


def dry_table(sizes: dict[str, Any]) -> str:
    """Returns the sizes of a run as a text table."""
    from hjepa_jax.runs.progress import format_table, sizes_table

    flops = sizes["flops_per_image"]
    total = flops * sizes["images_per_update"] * sizes["num_steps"]
    work = {
        "work": f"{flops / 1e9:.3g} GFLOP an image, {total:.2g} FLOP in all",
        "time": "not known before a step has run; a run tells it within seconds",
        "platform": sizes["platform"],
    }
    return format_table(sizes_table(sizes) | work)


def summary(workdir: pathlib.Path) -> str:
    """Returns a box with the best scores, the files of a run, and the commands to look at it."""
    from hjepa_jax.evaluation.results import format_best
    from hjepa_jax.runs.progress import summary_box
    from hjepa_jax.runs.scores import read_probe_json, rows_on, steps_if_outdated
    from hjepa_jax.runs.workdir import checkpoint_sizes, load_config

    config, lines = load_config(workdir), {}
    rows = rows_on(config.eval.data or config.data.source, read_probe_json(workdir / "probe.json"))
    last_step = max(checkpoint_sizes(workdir), default=0)
    for protocol, name in (("linear", "linear"), ("knn", "k-NN")):
        if best := format_best(rows, protocol):
            outdated = steps_if_outdated(rows, protocol, last_step)
            lines[f"best {name}"] = best + (f" (at {outdated})" if outdated else "")
    if (workdir / "report.html").exists():
        lines["report"] = str(workdir / "report.html")
    where = shlex.quote(str(workdir))
    if config.log.tensorboard:
        lines["curves"] = f"tensorboard --logdir {where}"
    lines["judge"] = f"python -m hjepa_jax.probe --workdir={where}"
    lines["features"] = f"python -m hjepa_jax.embed --workdir={where} ..."
    return summary_box(f"done: {workdir}", lines)


if __name__ == "__main__":
    cli.run(main)
