"""Rules of backends that this machine lacks: tests fake backend names and package versions."""

import dataclasses
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.config import build
from hjepa_jax.errors import InputError
from hjepa_jax.runs import run
from hjepa_jax.runtime import backend
from hjepa_jax.training import train
from tests import processes


@pytest.fixture
def pretend(monkeypatch):
    """Fakes a default backend and the versions of installed packages."""

    def pretend(name: str, **versions: str) -> dict[str, object]:
        def version(package: str) -> str:
            try:
                return versions[package.replace("-", "_")]
            except KeyError:
                raise importlib.metadata.PackageNotFoundError(package) from None

        settings = {}
        monkeypatch.setattr(jax, "default_backend", lambda: name)
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(jax.config, "update", settings.__setitem__)
        return settings

    return pretend


METAL = {"jax": "0.5.0", "jax_metal": "0.1.1"}
MPS = {"jax": "0.10.2", "jax_mps": "0.10.11"}


@pytest.mark.parametrize(
    ("choice", "versions", "name", "jax_platforms"),
    [
        ("metal", METAL, "METAL", "METAL,cpu"),  # the CPU creates the parameters
        ("mps", MPS, "mps", "mps,cpu"),
        ("cpu", METAL, "cpu", "cpu"),
        ("cpu", METAL | MPS, "cpu", "cpu"),  # an installed plugin does not matter
        ("auto", METAL, "METAL", None),
        ("auto", MPS | {"jax": "0.11.2"}, "mps", None),
        ("auto", {"jax": "0.10.2"}, "cpu", None),
    ],
)
def test_a_plugin_with_its_own_jax_is_accepted(pretend, choice, versions, name, jax_platforms):
    settings = pretend(name, **versions)
    assert backend.select_platform(choice) == name.lower()
    assert settings.get("jax_platforms") == jax_platforms


BOTH = r"jax-metal and jax-mps exclude each other.*\[metal\]"


@pytest.mark.parametrize(
    ("choice", "versions", "rule"),
    [
        ("metal", METAL | {"jax": "0.5.1"}, r"jax-metal cannot run with jax 0.5.1.*\[metal\]'$"),
        ("auto", METAL | {"jax": "0.10.2"}, r"jax-metal cannot run with jax 0.10.2.*\[metal\]'$"),
        ("mps", MPS | {"jax": "0.5.0"}, r"jax-mps cannot run with jax 0.5.0.*\[mps\]'$"),
        *((choice, METAL | MPS, BOTH) for choice in ("metal", "mps", "auto")),
        ("metal", MPS, r"needs jax-metal.*'hjepa-jax\[metal\]'$"),
        ("mps", METAL, r"needs jax-mps.*'hjepa-jax\[mps\]'$"),
        ("metal", {"jax": "0.5.0"}, "needs jax-metal"),
        ("mps", {"jax": "0.10.2"}, "needs jax-mps"),
    ],
)
def test_a_plugin_that_cannot_work_is_refused_with_the_extra_to_install(
    pretend, choice, versions, rule
):
    pretend("METAL", **versions)
    with pytest.raises(InputError, match=rule):
        backend.select_platform(choice)


def select_cuda():
    try:
        return backend.select_platform("cuda")
    except InputError as error:
        return str(error)


def test_a_silent_fallback_to_the_cpu_is_refused():
    """JAX falls back to the CPU if there is no NVIDIA GPU or no plugin."""
    expected = "gpu" if jax.default_backend() == "gpu" else "platform='cuda': JAX finds no"
    assert processes.call(select_cuda).startswith(expected)


@pytest.mark.parametrize(
    ("function", "choice", "error", "told"),
    [
        ("default_backend", "metal", "Unable to initialize\nat length", "Unable to initialize$"),
        # As with JAX_PLATFORMS=METAL: no CPU backend, but the CPU must create the parameters.
        ("devices", "auto", "Unknown backend cpu", "Unknown backend cpu"),
    ],
)
def test_a_backend_that_does_not_start_is_an_input_error(
    pretend, monkeypatch, function, choice, error, told
):
    pretend("METAL", **METAL)

    def fail(*_):
        raise RuntimeError(error)

    monkeypatch.setattr(jax, function, fail)
    with pytest.raises(InputError, match=f"does not start: {told}"):
        backend.select_platform(choice)


def test_the_rules_of_a_backend_name_its_limits(monkeypatch):
    told = {}
    for name in ("cpu", "gpu", "METAL", "mps"):
        monkeypatch.setattr(jax, "default_backend", lambda name=name: name)
        told[name] = str(backend.current_rules())
    mps = "no donated buffers, one step per call, parameters made on the CPU"
    assert told == {"cpu": "", "gpu": "", "METAL": f"{mps}, float32 only", "mps": mps}


@pytest.mark.parametrize(("name", "on_cpu"), [("cpu", False), ("METAL", True), ("mps", True)])
def test_parameters_are_made_on_the_cpu_for_apple_gpus(monkeypatch, name, on_cpu):
    monkeypatch.setattr(jax, "default_backend", lambda: name)
    seen = []

    def create():
        seen.append(jax.config.jax_default_device)
        return {"kernel": jnp.ones((2, 2))}

    made = backend.initialise(create)
    assert seen == [jax.devices("cpu")[0] if on_cpu else None]
    assert made["kernel"].devices() == {jax.devices()[0]}


@pytest.mark.parametrize(("backend", "refused"), [("cpu", False), ("mps", False), ("METAL", True)])
def test_bfloat16_is_refused_on_metal_only(tiny_config, monkeypatch, backend, refused):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    tiny_config.model.dtype = "bfloat16"
    if not refused:
        build.build_model(tiny_config)
        return
    with pytest.raises(InputError, match=r"model.dtype='bfloat16': must be float32 on metal"):
        build.build_model(tiny_config)


def test_a_run_on_metal_obeys_the_rules_and_logs_them(tiny_config, tmp_path, monkeypatch, capsys):
    """A spy records the options that the run passes to `lower`; the program is for the CPU."""
    asked = []
    built = train.build_run(tiny_config, run.open_config_source(tiny_config))

    def lower(**kwargs):
        asked.append(kwargs)
        return built.lower(steps_per_call=1, donate=True)

    spying = dataclasses.replace(built, lower=lower)
    monkeypatch.setattr(train, "build_run", lambda *_: spying)
    monkeypatch.setattr(train, "select_platform", lambda *_, **__: "metal")
    monkeypatch.setattr(jax, "default_backend", lambda: "METAL")
    tiny_config.train.steps_per_call = 4
    tiny_config.eval.every_epochs = 0.0
    train.train_and_evaluate(tiny_config, tmp_path)
    assert asked == [{"steps_per_call": 1, "donate": False}]
    rules = "no donated buffers, one step per call, parameters made on the CPU, float32 only"
    assert f"on metal ({rules})" in capsys.readouterr().out


OTHERS = {
    "jax_debug_infs": True,
    "jax_debug_nans": True,
    "jax_default_prng_impl": "rbg",
    "jax_disable_jit": True,
    "jax_enable_custom_prng": True,
    "jax_enable_x64": True,
    "jax_legacy_prng_key": "error",
    "jax_numpy_dtype_promotion": "strict",
    "jax_random_seed_offset": 7,
    "jax_threefry_partitionable": False,
    "jax_transfer_guard": "disallow",
}


@pytest.mark.parametrize("name", backend.SETTINGS)
def test_a_setting_that_changes_results_is_ignored_with_a_note(name, capsys):
    def draw():
        return np.asarray(jax.random.normal(jax.random.PRNGKey(3), (5,)))

    expected = draw()
    backend.fix_settings()
    assert capsys.readouterr().err == "", "there must be no note if all settings are right"
    jax.config.update(name, OTHERS[name])
    try:
        assert backend.select_platform("auto") == jax.default_backend()
        found = draw()
    finally:
        jax.config.update(name, backend.SETTINGS[name])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    value = backend.SETTINGS[name]
    line = f"note: {name.upper()}={OTHERS[name]} is ignored; every run uses {value}\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("name", backend.CHOICES)
@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unknown backend\nat length")])
def test_an_error_names_the_environment_variable_of_the_backend(monkeypatch, name, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "default_backend", fail)
    for other in backend.CHOICES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "cuda")
    with pytest.raises(InputError, match=rf"^{name}='cuda': this backend does not start: \w+"):
        backend.select_platform("auto")
    with pytest.raises(InputError, match=r"^platform='cpu': this backend does not start"):
        backend.select_platform("cpu")
