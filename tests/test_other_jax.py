"""A checkpoint written under one of the two pinned sets restores under the other.

The interpreter of the other set is named by HJEPA_OTHER_PYTHON, as .ci/run does.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

OTHER = os.environ.get("HJEPA_OTHER_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OTHER, reason="HJEPA_OTHER_PYTHON names no other interpreter"),
]

# Each prints one line of JSON: the version of jax, the step, and a digest of state and window.
PRELUDE = """
import json, pathlib, sys
import jax
from hjepa_jax.config import base_config
from hjepa_jax.evaluation.features import params_digest
from hjepa_jax.runs import checkpoint, run, workdir as directory
from hjepa_jax.training import train

workdir = pathlib.Path(sys.argv[1])
def show():
    config = directory.load_config(workdir)
    built = run.build_run(config, run.open_config_source(config))
    checkpoints = checkpoint.Checkpoints(workdir, config=config)
    state, window = checkpoints.restore(*built.create())
    print(json.dumps([jax.__version__, int(state.step), params_digest([state, window])]))
"""
WRITE = """
config = base_config().lock()
config.update(json.loads(sys.argv[2]))
train.train_and_evaluate(config, workdir)
show()
"""
READ = "\nshow()\n"


def report(python: str, code: str, *arguments: object) -> list:
    command = [python, "-c", PRELUDE + code, *map(str, arguments)]
    flags = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "XLA_FLAGS": flags}  # those of neither set: see conftest.py
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("we_write", [True, False], ids=["written_here", "written_there"])
def test_a_checkpoint_restores_under_the_other_set(tiny_config, tmp_path, we_write):
    tiny_config.eval.every_epochs = 0.0
    writer, reader = (sys.executable, OTHER) if we_write else (OTHER, sys.executable)
    written = report(writer, WRITE, tmp_path, json.dumps(tiny_config.to_dict()))
    read = report(reader, READ, tmp_path)
    assert written[0] != read[0], "both interpreters have the same jax"
    assert written[1:] == read[1:] == [6, read[2]]
