"""The rules of backends that this machine has not: their names and versions are pretended."""

import importlib.metadata
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.config import build
from hjepa_jax.errors import InputError
from hjepa_jax.runs import run
from hjepa_jax.runtime import backend
from hjepa_jax.training import train


@pytest.fixture
def pretend(monkeypatch):
    """Pretends a default backend, and which packages of which version are installed."""

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
        ("metal", METAL, "METAL", "METAL,cpu"),  # parameters are made on the CPU beside it
        ("mps", MPS, "mps", "mps,cpu"),
        ("cpu", METAL, "cpu", "cpu"),
        ("cpu", METAL | MPS, "cpu", "cpu"),  # plugins that are not asked for do no harm
        ("auto", METAL, "METAL", None),
        ("auto", MPS | {"jax": "0.11.2"}, "mps", None),
        ("auto", {"jax": "0.10.2"}, "cpu", None),
    ],
)
def test_a_plugin_with_its_own_jax_is_accepted(pretend, choice, versions, name, jax_platforms):
    settings = pretend(name, **versions)
    assert backend.select_platform(choice) == name.lower()
    assert settings.get("jax_platforms") == jax_platforms


@pytest.mark.parametrize("choice", ["metal", "auto"])
@pytest.mark.parametrize("version", ["0.5.1", "0.10.2"])
def test_jax_metal_with_a_jax_it_cannot_run_with_names_the_extra(pretend, choice, version):
    pretend("METAL", jax=version, jax_metal="0.1.1")
    rule = rf"jax-metal cannot run with jax {version}.*pip install 'hjepa-jax\[metal\]'$"
    with pytest.raises(InputError, match=rule):
        backend.select_platform(choice)


def test_jax_mps_with_an_old_jax_names_the_extra(pretend):
    pretend("mps", jax="0.5.0", jax_mps="0.10.11")
    rule = r"jax-mps cannot run with jax 0.5.0.*pip install 'hjepa-jax\[mps\]'$"
    with pytest.raises(InputError, match=rule):
        backend.select_platform("mps")


@pytest.mark.parametrize("choice", ["metal", "mps", "auto"])
def test_both_plugins_at_once_are_refused(pretend, choice):
    pretend("METAL", **(MPS | METAL))
    with pytest.raises(InputError, match=r"jax-metal and jax-mps exclude each other.*\[metal\]"):
        backend.select_platform(choice)


@pytest.mark.parametrize(
    ("choice", "versions"),
    [("metal", MPS), ("mps", METAL), ("metal", {"jax": "0.5.0"}), ("mps", {"jax": "0.10.2"})],
)
def test_a_backend_without_its_plugin_names_the_extra(pretend, choice, versions):
    pretend("cpu", **versions)
    with pytest.raises(InputError, match=rf"needs jax-{choice}.*'hjepa-jax\[{choice}\]'$"):
        backend.select_platform(choice)


def test_a_backend_in_whose_place_jax_takes_the_cpu_is_refused():
    """As of "cuda,cpu", where there is no NVIDIA GPU or no plugin for it."""
    code = (
        "import jax; from hjepa_jax import errors; from hjepa_jax.runtime import backend\n"
        "try: print(backend.select_platform('cuda'), jax.default_backend())\n"
        "except errors.InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = "gpu gpu" if jax.default_backend() == "gpu" else "platform='cuda': JAX finds no"
    assert done.stdout.startswith(expected)


def test_a_backend_that_does_not_start_is_an_input_error(pretend, monkeypatch):
    pretend("METAL", **METAL)

    def fail():
        raise RuntimeError("Unable to initialize backend 'METAL'\nat length")

    monkeypatch.setattr(jax, "default_backend", fail)
    with pytest.raises(InputError, match=r"does not start: Unable to initialize backend 'METAL'$"):
        backend.select_platform("metal")


def test_metal_without_the_cpu_beside_it_is_refused(pretend, monkeypatch):
    """As with JAX_PLATFORMS=METAL: then nothing could make the parameters."""
    pretend("METAL", **METAL)

    def devices(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(InputError, match="Unknown backend cpu"):
        backend.select_platform("auto")


def test_rules_of_the_backends_say_what_each_cannot_do(monkeypatch):
    told = {}
    for name in ("cpu", "gpu", "METAL", "mps"):
        monkeypatch.setattr(jax, "default_backend", lambda name=name: name)
        told[name] = str(backend.current_rules())
    mps = "no donated buffers, one step per call, parameters made on the CPU"
    assert told == {"cpu": "", "gpu": "", "METAL": f"{mps}, float32 only", "mps": mps}


@pytest.mark.parametrize(("name", "on_cpu"), [("cpu", False), ("METAL", True), ("mps", True)])
def test_parameters_are_made_on_the_cpu_and_then_moved(monkeypatch, name, on_cpu):
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
    asked, build_run = [], run.build_run

    def spying(config, source):
        built = build_run(config, source)

        def lower(**kwargs):
            asked.append(kwargs)
            return built.lower(**kwargs)

        return run.dataclasses.replace(built, lower=lower)

    monkeypatch.setattr(train, "build_run", spying)
    monkeypatch.setattr(train, "select_platform", lambda *_, **__: "metal")
    monkeypatch.setattr(jax, "default_backend", lambda: "METAL")
    tiny_config.train.steps_per_call = 4
    tiny_config.train.num_steps = 2
    tiny_config.eval.every_epochs = 0.0
    train.train_and_evaluate(tiny_config, tmp_path)
    assert asked == [{"steps_per_call": 1, "donate": False}]
    assert (
        "on metal (no donated buffers, one step per call, parameters made on the CPU, float32 only)"
        in capsys.readouterr().out
    )


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
def test_a_setting_under_which_runs_would_differ_is_ignored_with_a_line(name, capsys):
    def draw():
        return np.asarray(jax.random.normal(jax.random.PRNGKey(3), (5,)))

    expected = draw()
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


def test_the_usual_settings_are_left_without_a_word(capsys):
    backend.fix_settings()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", backend.CHOICES)
@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unknown backend\nat length")])
def test_a_backend_that_the_environment_asks_for_is_named_so(monkeypatch, name, error):
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
