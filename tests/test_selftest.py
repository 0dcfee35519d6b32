"""The self-test. Here it compares the CPU with itself and with a modified copy."""

import json
import runpy
import types

import jax
import numpy as np
import pytest

from hjepa_jax import selftest
from hjepa_jax.config import build
from tests.conftest import REPOSITORY


def result(**changes):
    grads = {"['a']": np.full(4, 1.0), "['b']": np.full(2, 1e-9)}
    masks = {"context_index": np.arange(6)}
    return selftest.StepResult(**{"masks": masks, "loss": 2.0, "grads": grads} | changes)


def failures(found):
    return [check.quantity for check in selftest.compare(result(), found) if not check.passes]


def test_equal_results_pass():
    assert failures(result()) == []


@pytest.mark.parametrize(
    ("changes", "quantity"),
    [
        ({"masks": {"context_index": np.array([0, 1, 2, 3, 4, 6])}}, "masks"),
        ({"loss": 2.0 * (1 + 2e-4)}, "loss"),
        ({"loss": float("nan")}, "loss"),
        ({"grads": {"['a']": np.array([1, 1, 1, 1.01]), "['b']": np.full(2, 1e-9)}}, "['a']"),
        ({"grads": {"['a']": np.full(4, 1.0), "['b']": np.full(2, 1e-4)}}, "['b']"),
        ({"grads": {"['a']": np.full(4, np.nan), "['b']": np.full(2, 1e-9)}}, "['a']"),
    ],
)
def test_a_quantity_out_of_tolerance_is_named(changes, quantity):
    (failure,) = failures(result(**changes))
    assert quantity in failure


def test_rounding_passes_even_if_the_gradient_is_only_rounding():
    grads = {"['a']": np.full(4, 1.0 + 1e-5), "['b']": np.full(2, -1e-9)}
    assert failures(result(loss=2.0 * (1 + 1e-6), grads=grads)) == []


@pytest.mark.slow
def test_gradients_are_read_from_the_state_of_both_optimizers(tiny_config):
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    tiny_config.optim.clip_norm = 0.0
    found = []
    for kind in ("adamw", "muon"):
        tiny_config.optim.kind = kind
        schedules = build.build_schedules(tiny_config, 40)
        model, tx = build.build_model(tiny_config), build.build_optimizer(tiny_config, schedules)
        state = build.build_create_state(tiny_config, model, tx)()
        step = build.build_train_step(tiny_config, model, tx, schedules)
        found.append(selftest.run_step(tiny_config, step, state, images).grads)
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        np.testing.assert_allclose(found[1][name], grad, rtol=1e-5, atol=1e-8)


@pytest.fixture
def command(tmp_path, tiny_config, monkeypatch):
    """Runs the command on a tiny config; returns its exit status and its report."""

    def run() -> tuple[object, dict]:
        output, status = tmp_path / "selftest.json", 0
        for flag, value in (("_STEPS", 1), ("_OUTPUT", str(output))):
            monkeypatch.setattr(selftest, flag, types.SimpleNamespace(value=value))
        monkeypatch.setattr(runpy, "run_path", lambda _: {"get_config": lambda: tiny_config})
        try:
            selftest.main()
        except SystemExit as end:
            status = end.code
        return status, json.loads(output.read_text())

    return run


@pytest.mark.slow
def test_the_command_passes_on_the_cpu_and_writes_a_report(command, capsys):
    status, report = command()
    assert status == 0, report["verdict"]
    same = "(the CPU against itself"
    assert f"PASS: masks equal, loss and gradients agree {same}" in capsys.readouterr().out
    assert (report["verdict"], report["passed"], report["steps"]) == ("pass", True, 1)
    assert {"python", "jax", "jaxlib", "flax", "hjepa-jax"} <= set(report["versions"])
    assert report["peak_memory_bytes"] > 1e7
    assert report["images_per_sec"] > 0
    assert {check["quantity"] for check in report["checks"]} >= {"masks", "loss"}
    assert sum(check["quantity"].startswith("gradient of ") for check in report["checks"]) > 10


@pytest.mark.slow
def test_a_perturbed_weight_fails_and_names_the_first_difference(command, monkeypatch, capsys):
    honest, calls = selftest.run_step, []

    def spoiled(config, train_step, state, images):
        calls.append(1)
        if len(calls) == 2:  # the first is on the CPU, the second on the device
            nudge = lambda path, x: x * 1.1 if "mask_token" in str(path) else x
            state = state.replace(params=jax.tree_util.tree_map_with_path(nudge, state.params))
        return honest(config, train_step, state, images)

    monkeypatch.setattr(selftest, "run_step", spoiled)
    status, report = command()
    assert (status, report["passed"]) == (1, False)
    assert report["verdict"].startswith(("loss on cpu is off from the CPU's by", "gradient of "))
    assert f"FAIL: {report['verdict']}" in capsys.readouterr().err


def test_its_config_exists():
    assert selftest.CONFIG == REPOSITORY / "hjepa_jax" / "configs" / "cifar10_patches.py"
    assert selftest.CONFIG.exists()
