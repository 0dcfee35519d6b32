"""What the extras for Apple GPUs bring on a Mac, as a resolver sees it from here."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow  # asks the package index


@pytest.fixture(scope="session")
def resolve(tmp_path_factory):
    """`resolve(python, *extras)`: uv's outcome for macOS on Apple Silicon; installs nothing."""
    environment = tmp_path_factory.mktemp("uv")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin/python", "-m", "pip"]
    installed = subprocess.run([*pip, "install", "uv"], capture_output=True, text=True, check=False)
    if installed.returncode:
        reason = installed.stderr.strip().splitlines()[-1:]
        pytest.skip(f"the package index cannot be reached: {reason}")
    # pip's settings, in uv's words.
    index = subprocess.run(
        [*pip, "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    ).stdout.strip()
    settings = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}  # jax-mps asks for it
    if index:
        settings["UV_DEFAULT_INDEX"] = index
    if "PIP_CERT" in os.environ:
        settings["SSL_CERT_FILE"] = os.environ["PIP_CERT"]

    def resolve(python: str, *extras: str) -> subprocess.CompletedProcess[str]:
        # Without tool.uv's list of conflicts: the packages themselves must not go together.
        pyproject = (REPOSITORY / "pyproject.toml").read_text()
        project = environment / "pyproject.toml"
        project.write_text(re.sub(r"^conflicts = \[.*?^\]\n", "", pyproject, flags=re.M | re.S))
        command = [environment / "bin/uv", "pip", "compile", project, "--no-header"]
        command += ["--no-annotate", "--python-platform=aarch64-apple-darwin"]
        command += [f"--python-version={python}", *(f"--extra={extra}" for extra in extras)]
        return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)

    return resolve


def versions(outcome: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert outcome.returncode == 0, outcome.stderr
    pairs = re.findall(r"^([\w.-]+)==(\S+)", outcome.stdout, flags=re.M)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_metal_resolves_to_the_only_jax_that_its_plugin_runs_with(resolve, python):
    found = versions(resolve(python, "metal"))
    assert (found["jax-metal"], found["jax"], found["jaxlib"]) == ("0.1.1", "0.5.0", "0.5.0")
    assert "jax-mps" not in found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_mps_resolves_to_a_plugin_of_the_same_minor_version_as_jax(resolve, python):
    found = versions(resolve(python, "mps"))
    assert "jax-metal" not in found
    assert found["jax-mps"].split(".")[:2] == found["jax"].split(".")[:2]


def test_the_two_plugins_do_not_resolve_together(resolve):
    assert "No solution found" in resolve("3.11", "metal", "mps").stderr


def test_no_index_address_is_in_the_project():
    assert "index-url" not in pathlib.Path(REPOSITORY / "pyproject.toml").read_text()
