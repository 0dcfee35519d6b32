"""SIGKILL at random moments: a run loses only the steps since its last checkpoint."""

import json
import pathlib
import random
import time

import jax
import numpy as np
import pytest

from hjepa_jax.runs.history import read_metrics
from hjepa_jax.training import train
from tests import processes
from tests.processes import state_and_lines

NUM_KILLS = 12
NUM_STEPS, SAVE_EVERY = 40, 3

pytestmark = pytest.mark.slow


def newest_line(workdir: pathlib.Path) -> int:
    return max((line["step"] for line in read_metrics(workdir / "metrics.jsonl")), default=0)


def newest_checkpoint(workdir: pathlib.Path) -> int:
    folder = workdir / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()] if folder.exists() else []
    return max(steps, default=0)


def run_and_kill(config, workdir: pathlib.Path, rng: random.Random) -> str:
    """Starts or resumes the run and kills it at random; returns "killed" or "finished"."""
    process = processes.start(config, workdir)
    if rng.random() < 0.2:  # at any time, even during imports
        time.sleep(rng.uniform(0, 2))
    else:  # during steps and saves
        goal = newest_checkpoint(workdir) + rng.randint(1, 5 * SAVE_EVERY)
        while process.is_alive() and newest_line(workdir) < min(goal, NUM_STEPS):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.1))
    process.kill()
    process.join()
    assert process.exitcode in (0, -9), processes.printed(workdir)
    return "finished" if process.exitcode == 0 else "killed"


def test_kills_change_nothing(tiny_config, tmp_path, record_property):
    tiny_config.train.num_steps, tiny_config.train.checkpoint_every_steps = NUM_STEPS, SAVE_EVERY
    tiny_config.eval.every_epochs = 1.0  # every 15 steps; the best checkpoint by k-NN is kept
    tiny_config.log.every_steps = 1
    train.train_and_evaluate(tiny_config, tmp_path / "whole")
    whole_arrays, whole_lines = state_and_lines(tiny_config, tmp_path / "whole")

    rng = random.Random(0)
    num_kills, num_runs, resumed_at = 0, 0, []
    while num_kills < NUM_KILLS:
        num_runs += 1
        workdir = tmp_path / f"run_{num_runs}"
        outcome = "killed"
        while outcome == "killed":
            before = newest_checkpoint(workdir)
            if num_kills < NUM_KILLS:
                outcome = run_and_kill(tiny_config, workdir, rng)
                num_kills += outcome == "killed"
                resumed_at.append(before)
            else:
                assert processes.finish(tiny_config, workdir) == 0, processes.printed(workdir)
                outcome = "finished"
            assert newest_checkpoint(workdir) >= before  # no saved checkpoint is lost
            # At most one save is still running, and the next one has not started.
            assert newest_line(workdir) - newest_checkpoint(workdir) <= 2 * SAVE_EVERY
        arrays, lines = state_and_lines(tiny_config, workdir)
        jax.tree.map(np.testing.assert_array_equal, arrays, whole_arrays)
        assert lines == whole_lines
        assert not (workdir / "damaged").exists()
    assert len(set(resumed_at)) >= 5, f"the kills hit too few different steps: {resumed_at}"
    record_property("kills", json.dumps({"kills": num_kills, "runs": num_runs}))
    print(f"{num_kills} kills over {num_runs} runs, resumed from steps {sorted(set(resumed_at))}")
