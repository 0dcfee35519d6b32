"""The extras for Apple GPUs resolve to the right versions for a Mac, on any machine."""

import functools
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow  # needs the package index


@pytest.fixture(scope="session")
def resolve(tmp_path_factory):
    """A function that lets uv resolve extras for macOS on Apple Silicon, and installs nothing."""
    folder = tmp_path_factory.mktemp("uv")
    pip = [sys.executable, "-m", "pip"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
    installed = run([*pip, "install", f"--target={folder}", "uv"])
    if installed.returncode:
        reason = installed.stderr.strip().splitlines()[-1:]
        pytest.skip(f"the package index cannot be reached: {reason}")
    # uv gets the settings of pip.
    index = run([*pip, "config", "get", "global.index-url"]).stdout.strip()
    settings = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}  # required by jax-mps
    if index:
        settings["UV_DEFAULT_INDEX"] = index
    if "PIP_CERT" in os.environ:
        settings["SSL_CERT_FILE"] = os.environ["PIP_CERT"]
    # The list of conflicts in tool.uv is removed, because the packages themselves must conflict.
    text, project = (REPOSITORY / "pyproject.toml").read_text(), folder / "pyproject.toml"
    project.write_text(re.sub(r"^conflicts = \[.*?^\]\n", "", text, flags=re.M | re.S))

    def resolve(python: str, *extras: str) -> subprocess.CompletedProcess[str]:
        command = [folder / "bin/uv", "pip", "compile", project, "--no-header", "--no-annotate"]
        command += ["--python-platform=aarch64-apple-darwin", f"--python-version={python}"]
        return run([*command, *(f"--extra={extra}" for extra in extras)], env=settings)

    return resolve


def versions(outcome: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert outcome.returncode == 0, outcome.stderr
    pairs = re.findall(r"^([\w.-]+)==(\S+)", outcome.stdout, flags=re.M)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_metal_resolves_to_the_only_jax_that_its_plugin_runs_with(resolve, python):
    found = versions(resolve(python, "metal"))
    assert (found["jax-metal"], found["jax"], found["jaxlib"]) == ("0.1.1", "0.5.0", "0.5.0")
    assert "jax-mps" not in found


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_mps_resolves_to_a_plugin_of_the_same_minor_version_as_jax(resolve, python):
    found = versions(resolve(python, "mps"))
    assert "jax-metal" not in found
    assert found["jax-mps"].split(".")[:2] == found["jax"].split(".")[:2]


def test_the_two_plugins_do_not_resolve_together(resolve):
    assert "No solution found" in resolve("3.11", "metal", "mps").stderr


def test_no_index_address_is_in_the_project():
    assert "index-url" not in (REPOSITORY / "pyproject.toml").read_text()
