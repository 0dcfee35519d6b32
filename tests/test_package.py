"""The package after `pip install`: configs by name, the command `hjepa`, wheel and sdist."""

import functools
import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile

import numpy as np
import pytest
from PIL import Image

from hjepa_jax import command_line
from tests.conftest import REPOSITORY

SHIPPED = REPOSITORY / "hjepa_jax" / "configs" / "shapes_tiny.py"


@pytest.mark.parametrize("value", ["shapes_tiny", "configs/shapes_tiny", "configs/shapes_tiny.py"])
def test_a_shipped_config_is_found_by_name_in_any_folder(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line.config_path_of(value) == str(SHIPPED)
    assert command_line.config_path_of(f"{value}:small") == f"{SHIPPED}:small"


@pytest.mark.parametrize("value", ["no_such_config", "other/shapes_tiny.py", "shapes_tiny.py"])
def test_other_values_of_config_are_paths(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line.config_path_of(value) == value


def test_a_file_of_the_user_goes_before_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "shapes_tiny.py"
    own.touch()
    assert command_line.config_path_of("configs/shapes_tiny.py") == "configs/shapes_tiny.py"


def hjepa(*arguments, python=sys.executable, **options):
    command = [python, "-m", "hjepa_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_the_command_lists_its_commands_and_refuses_others():
    page = hjepa("--help")
    assert page.returncode == 0
    assert all(f"\n  {name} " in page.stdout for name in ("train", "probe", "export", "convert"))
    other = hjepa("trian")
    assert (other.returncode, len(other.stderr.splitlines())) == (2, 1)
    assert "'trian': must be one of train, config, sweep, probe" in other.stderr
    assert "--workdir" in hjepa("report", "--help").stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", f"--target={folder}"]
    run = functools.partial(subprocess.run, capture_output=True, text=True)
    installed = run([*pip, "build", "hatchling"], check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install the build tools: {installed.stderr[-200:]}")
    build = [sys.executable, "-m", "build", "--no-isolation", f"--outdir={folder}", REPOSITORY]
    run(build, check=True, env={**os.environ, "PYTHONPATH": str(folder)})
    return folder


@pytest.mark.slow
def test_the_source_package_builds_from_few_files(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [pathlib.PurePath(*pathlib.PurePath(n).parts[1:]) for n in archive.getnames()]
    assert pathlib.PurePath("hjepa_jax/configs/shapes_tiny.py") in names
    assert {name.parts[0] for name in names if len(name.parts) > 1} == {"hjepa_jax", "tests"}


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(built, tmp_path):
    """The dependencies come from this environment, the package only from the wheel."""
    environment, here = tmp_path / "environment", tmp_path / "elsewhere"
    here.mkdir()
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        options = {"cwd": here, "env": plain, "capture_output": True, "text": True}
        done = subprocess.run(command, check=False, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q", wheel)
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import hjepa_jax; print(hjepa_jax.__file__)")
    assert pathlib.Path(where.strip()).is_relative_to(environment)
    assert (packages / "hjepa_jax" / "py.typed").exists()
    own = "from hjepa_jax.configs import shapes_tiny\nget_config = shapes_tiny.get_config\n"
    (here / "own.py").write_text(own)
    for config in ("shapes_tiny", "configs/shapes_tiny.py", "own.py"):
        said = run(environment / "bin" / "hjepa", "train", config, "--dry_run", "--json")
        assert '"num_patches"' in said
    Image.new("RGB", (40, 30)).save(here / "photo.png")
    run(
        environment / "bin" / "hjepa", "embed", "--model=cifar10_tiny", "--output=f.npy",
        "--features=summary", "photo.png",
    )  # fmt: skip
    assert len(np.load(here / "f.npy")) == 1
