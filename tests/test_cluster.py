"""Runs in several processes: they agree, and if one is lost, the others exit."""

import contextlib
import json
import os
import pathlib
import time

import jax
import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.method.window import empty_window, make_averages
from hjepa_jax.runs import checkpoint
from hjepa_jax.runs.array_table import describe_arrays
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.runs.logger import SilentLogger
from hjepa_jax.runtime import backend, cluster
from hjepa_jax.runtime.placement import make_placement
from tests import processes
from tests.faults.test_kills import newest_checkpoint, newest_line

several = pytest.mark.skipif(
    jax.__version_info__ < cluster.MIN_JAX, reason="several processes need a newer jax"
)


def test_a_single_process_agrees_with_itself():
    assert cluster.is_first()
    assert cluster.largest(-3) == -3
    cluster.check_same("seed", 1, 12345)
    with cluster.first_process_first():
        pass
    cluster.leave("nobody hears it")
    squares = cluster.divided(lambda items: items**2, np.arange(5))
    np.testing.assert_array_equal(squares, [0, 1, 4, 9, 16])


def test_an_error_of_process_0_is_raised():
    def refuse():
        raise InputError("--workdir", "x", "no")

    with pytest.raises(InputError, match="--workdir='x': no"):
        cluster.by_first(refuse)


def test_the_other_processes_log_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    logger = SilentLogger()
    for step in (1, 2):
        logger.scalars(step, {"train/loss": 1.0})
    logger.texts(0, {"config": "x"})
    logger.end_line()
    logger.close()
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_an_invalid_coordinator_gives_one_line(run_module):
    arguments = ("hjepa_jax.main", "--config=configs/shapes_tiny.py")
    done = run_module(*arguments, "--coordinator=here")
    assert done.returncode == 2
    rule = "must be auto, or host and port" if jax.__version_info__ >= cluster.MIN_JAX else "needs"
    assert done.stderr.startswith(f"error: --coordinator='here': {rule}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("told", [{"num_processes": 2}, {"process_id": 1}])
def test_several_processes_need_a_coordinator(told):
    refused = pytest.raises(InputError, match="--coordinator=None: must be given")
    with refused, cluster.member(None, **told):
        pass


TREE = {"kernel": np.arange(64 * 96, dtype=np.float32).reshape(64, 96), "bias": np.ones(96, "f")}
# name: (number of processes, devices per process, fsdp)
LAYOUTS = {"one": (1, 1, 1), "four": (1, 4, 2), "eight": (1, 8, 8), "processes": (2, 2, 4)}


def move_checkpoints(
    folder: pathlib.Path, config, name: str, coordinator: str | None, index: int, saves: bool
) -> None:
    """Saves a state in the layout `name`, or reads the states of all layouts into this layout."""
    num, devices, fsdp = LAYOUTS[name]
    with cluster.member(coordinator, num_processes=num, process_id=index):
        backend.select_platform("cpu", cpu_devices=devices)
        place = make_placement(jax.devices(), fsdp=fsdp)

        def state(step: int) -> TrainState:
            params = {key: value + step for key, value in TREE.items()}
            host = TrainState(np.int32(step), params, params, params, np.zeros(2, np.uint32))
            return place.put(host, place.state(host) or None)

        window = empty_window(make_averages(["loss"]), batch_size=4, width=2)
        window = place.put(window, place.whole)
        for step, other in enumerate(LAYOUTS):
            if saves and other != name:
                continue
            with checkpoint.Checkpoints(folder / other, config=config, owner=True) as checkpoints:
                if saves:
                    checkpoints.save(state(step), window, scores={})
                    continue
                found, _ = checkpoints.restore(state(99), window)
                assert describe_arrays(found) == describe_arrays(state(step))
                kernel = found.params["kernel"]
                assert kernel.addressable_shards[0].data.size * fsdp == kernel.size
        cluster.leave()


def run_both(target, *args):
    """Starts `target(*args, coordinator, index)` in two processes; returns the processes."""
    address = processes.free_address()
    both = [processes.CONTEXT.Process(target=target, args=(*args, address, i)) for i in range(2)]
    for process in both:
        process.start()
    return both


@several
@pytest.mark.slow
def test_every_layout_reads_the_checkpoints_of_every_other(tiny_config, tmp_path):
    """The arrays are equal bit for bit, and have the sharding of the layout that reads them."""
    for saves in (True, False):
        for name, (num, _, _) in LAYOUTS.items():
            (tmp_path / name).mkdir(exist_ok=True)
            address = processes.free_address() if num > 1 else None
            args = [(tmp_path, tiny_config, name, address, index, saves) for index in range(num)]
            started = [processes.CONTEXT.Process(target=move_checkpoints, args=a) for a in args]
            for process in started:
                process.start()
            for process in started:
                process.join()
                assert process.exitcode == 0, (name, saves)


@several
@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_other_and_one_can_resume(tiny_config, tmp_path, victim):
    tiny_config.train.num_steps = 100_000
    tiny_config.log.every_steps = 1
    tiny_config.eval.every_epochs = 0.0
    workdir = tmp_path / "run"
    both = processes.start_several(tiny_config, workdir, 2)
    while newest_checkpoint(workdir) < 3:
        assert all(process.is_alive() for process in both), processes.printed(workdir)
        time.sleep(0.05)
    both[victim].kill()
    killed = time.monotonic()
    other = both[1 - victim]
    other.join(60)
    assert time.monotonic() - killed < 60
    told = processes.printed(workdir, 1 - victim)
    assert other.exitcode not in (0, None)
    assert f"process {victim} of 2 is silent" in told or "process 0 does not answer" in told or (
        victim == 0 and "JAX distributed service detected fatal errors" in told
    ), told  # fmt: skip
    if victim == 1:
        assert other.exitcode == cluster.LOST
        assert told.count("error: ") == 1

    saved = newest_checkpoint(workdir)
    code = processes.finish(tiny_config, workdir, stop_step=saved + 2)
    assert code == 143, processes.printed(workdir)
    steps = [line["step"] for line in read_metrics(workdir / "metrics.jsonl")]
    assert steps == list(range(1, newest_line(workdir) + 1))
    assert newest_checkpoint(workdir) >= saved + 2


def give_up(path: pathlib.Path, coordinator: str, index: int) -> None:
    """Process 0 ends with an error; the other one continues."""
    os.dup2(os.open(path / f"{index}.err", os.O_WRONLY | os.O_CREAT), 2)
    member = cluster.member(coordinator, num_processes=2, process_id=index)
    with contextlib.suppress(InputError), member:
        cluster.meet()
        if index == 0:
            raise InputError("data.source", "x", "is a full disk")
        time.sleep(600)


@several
@pytest.mark.slow
def test_an_error_of_process_0_ends_process_1_with_one_line(tmp_path):
    for process in reversed(both := run_both(give_up, tmp_path)):
        process.join(60)
    assert both[1].exitcode == cluster.LOST
    lines = (tmp_path / "1.err").read_text().splitlines()
    (line,) = [line for line in lines if "error: " in line]
    assert line.startswith("error: process 0 of 2 has ended (data.source='x': is a full disk)")


def run_out_of_memory(path: pathlib.Path, coordinator: str, index: int) -> None:
    """Process 1 runs out of memory; the other one continues."""
    os.dup2(os.open(path / f"{index}.err", os.O_WRONLY | os.O_CREAT), 2)
    with cluster.member(coordinator, num_processes=2, process_id=index):
        cluster.meet()
        if index == 0:
            time.sleep(600)
        (path / "began").touch()
        jax.device_put(np.int8(1)).reshape(1, 1) + jax.numpy.zeros((2**24, 2**24), np.int8)


@several
@pytest.mark.slow
def test_an_error_of_jax_in_one_process_is_reported_at_once(tmp_path):
    """The report must not take the 30 seconds after which a silent process counts as lost."""
    both, told = run_both(run_out_of_memory, tmp_path), tmp_path / "1.err"
    while not (told.exists() and "error: RESOURCE_EXHAUSTED" in told.read_text()):
        assert both[1].is_alive()
        time.sleep(0.05)
    seconds = time.time() - (tmp_path / "began").stat().st_mtime
    for process in both:
        process.join(60)
    assert seconds < 10
    assert both[0].exitcode == cluster.LOST
    assert "process 1 of 2 has ended (RESOURCE_EXHAUSTED" in (tmp_path / "0.err").read_text()


@several
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rates", "workdirs", "rule"),
    [
        ((0.1, 0.2), ("run", "run"), "must be the same in all processes of a run"),
        ((0.1, 0.1), ("here", "there"), "must be shared by all processes"),
    ],
    ids=("other configs", "other workdirs"),
)
def test_processes_that_do_not_agree_are_refused(tiny_config, tmp_path, rates, workdirs, rule):
    address, both = processes.free_address(), []
    for index, (rate, name) in enumerate(zip(rates, workdirs, strict=True)):
        tiny_config.optim.learning_rate = rate
        options = {"coordinator": address, "process": (index, 2)}
        both.append(processes.start(tiny_config, tmp_path / name, **options))
    for index, (process, name) in enumerate(zip(both, workdirs, strict=True)):
        process.join()
        assert process.exitcode == 2
        assert rule in processes.printed(tmp_path / name, index)
    assert not (tmp_path / "run").exists()


@several
@pytest.mark.slow
def test_two_processes_stop_resume_and_evaluate_a_run(tiny_config, tmp_path):
    """Signals reach the two processes at different steps. The resumed run has all results.

    There is one held-out image, so one process has none. test_layouts uses more images.
    """
    tiny_config.log.every_steps, tiny_config.eval.num_val = 1, 1
    tiny_config.log.report = tiny_config.eval.probe_at_end = True
    workdir, address = tmp_path / "run", processes.free_address()
    both = [
        processes.start(tiny_config, workdir, stop_step=step, coordinator=address, process=(i, 2))
        for i, step in enumerate((2, 3))
    ]
    for index, process in enumerate(both):
        process.join()
        assert process.exitcode == 143, processes.printed(workdir, index)
    assert newest_checkpoint(workdir) == newest_line(workdir) in (2, 3)
    assert not (workdir / "report.html").exists()
    assert processes.finish(tiny_config, workdir, num=2) == 0
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["eval/knn_top1"] in (0, 1)
    rows = json.loads((workdir / "probe.json").read_text())["results"]
    assert {row["encoder"] for row in rows} == {"target", "random_init", "pixels"}
    assert (workdir / "report.html").exists()
    assert "warning" not in processes.printed(workdir)
    assert processes.printed(workdir, 1) == ""
