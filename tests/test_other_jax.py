"""A checkpoint saved with one of the two pinned sets of packages restores with the other.

The variable HJEPA_OTHER_PYTHON names the interpreter of the other set; `make test-slow` sets it.
"""

import json
import os
import pathlib
import subprocess

import jax
import pytest

from hjepa_jax.evaluation.feature_cache import params_digest
from hjepa_jax.runs import checkpoint, run
from hjepa_jax.training import train
from tests.conftest import REPOSITORY

OTHER = os.environ.get("HJEPA_OTHER_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OTHER, reason="HJEPA_OTHER_PYTHON is not set"),
]

# Prints a line of JSON for each work directory: the version of jax, the step, and a digest of state
# and window. If a directory does not exist, the code first trains a run there.
CODE = """
import json, pathlib, sys
import jax
from hjepa_jax.config import base_config
from hjepa_jax.evaluation.feature_cache import params_digest
from hjepa_jax.runs import checkpoint, run, workdir as directory
from hjepa_jax.training import train

for workdir in map(pathlib.Path, sys.argv[2:]):
    if not workdir.exists():
        config = base_config().lock()
        config.update(json.loads(sys.argv[1]))
        train.train_and_evaluate(config, workdir)
    config = directory.load_config(workdir)
    built = run.build_run(config, run.open_config_source(config))
    checkpoints = checkpoint.Checkpoints(workdir, config=config)
    state, window = checkpoints.restore(*built.create())
    print(json.dumps([jax.__version__, int(state.step), params_digest([state, window])]))
"""


def report_here(config, workdir: pathlib.Path) -> list:
    """Returns what `CODE` prints for a run, from this process."""
    built = train.build_run(config, run.open_config_source(config))
    with checkpoint.Checkpoints(workdir, config=config) as checkpoints:
        state, window = checkpoints.restore(*built.create())
    return [jax.__version__, int(state.step), params_digest([state, window])]


def report_there(config, *workdirs: pathlib.Path) -> list[list]:
    command = [OTHER, "-c", CODE, json.dumps(config.to_dict()), *map(str, workdirs)]
    flags = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "XLA_FLAGS": flags}  # both versions know these: see conftest.py
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_checkpoints_restore_under_the_other_set(tiny_config, tmp_path):
    tiny_config.eval.every_epochs = 0.0
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    train.train_and_evaluate(tiny_config, ours)
    we_wrote = report_here(tiny_config, ours)
    they_read, they_wrote = report_there(tiny_config, ours, theirs)
    we_read = report_here(tiny_config, theirs)
    for written, read in ((we_wrote, they_read), (they_wrote, we_read)):
        assert written[0] != read[0], "both interpreters have the same jax"
        assert written[1:] == read[1:] == [6, read[2]]
