"""Test set-up: CPU, shape checks at run time, strict rank promotion, a shared compilation cache."""

import atexit
import importlib.metadata
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any


def temporary(what: str) -> str:
    """Creates a directory that is removed when this process exits."""
    path = tempfile.mkdtemp(prefix=f"hjepa_jax_{what}_")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tiny programs spend their time in the compiler, so it should optimize less. At level 0, jaxlib
# 0.5.0 computes wrong integers: masks overlap and contain patches that do not exist. jaxlib 0.10.2
# compiles in less than half the time without its newer emitters. Older versions do not know these
# flags.
FASTER = {
    "0.5.0": "--xla_backend_optimization_level=1",
    "0.10.2": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1",
}.get(importlib.metadata.version("jaxlib"), "--xla_backend_optimization_level=0")
FASTER += " --xla_llvm_disable_expensive_passes=true --xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("XLA_FLAGS", FASTER)
# Tests, and the commands that they start, share compiled programs through a cache on disk.
if importlib.metadata.version("jaxlib").startswith("0.5."):  # see `keep_compiled_programs`
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = temporary("cache")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["XDG_CACHE_HOME"] = temporary("home")
# Matplotlib takes seconds to list the fonts. All workers and commands share the list.
if "MPLCONFIGDIR" not in os.environ:
    os.environ["MPLCONFIGDIR"] = temporary("matplotlib")
# Each core has a worker, so more threads of NumPy and XLA would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# If a process reads a cache entry that another one is writing, it warns and compiles by itself.
for doing in ("reading", "writing"):
    others = os.environ.get("PYTHONWARNINGS")
    ignored = f"ignore:Error {doing} persistent compilation cache entry:UserWarning"
    os.environ["PYTHONWARNINGS"] = f"{others},{ignored}" if others else ignored

import jax
import pytest
from jaxtyping import install_import_hook
from PIL import Image

import tests.typechecker  # noqa: F401  (the hook below looks it up by name)

jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("hjepa_jax", "tests.typechecker.check")

from hjepa_jax.config import Config, base_config
from hjepa_jax.data.base import Split
from hjepa_jax.data.npz import save_npz
from hjepa_jax.data.shapes import create_shapes
from tests import programs, suite

REPOSITORY = pathlib.Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the tests before xdist gives them to its workers; see tests/suite.py."""
    suite.arrange(items)


@pytest.fixture(scope="session", autouse=True)
def shared_programs() -> Iterator[pytest.MonkeyPatch]:
    """Runs with the same program trace and compile it once; see tests/programs.py."""
    with pytest.MonkeyPatch.context() as patch:
        programs.share(patch)
        yield patch


@pytest.fixture
def own_programs(shared_programs: pytest.MonkeyPatch) -> Iterator[None]:
    """Turns sharing off: the runs of this test trace and compile everything by themselves."""
    shared_programs.undo()
    yield
    programs.share(shared_programs)


@pytest.fixture
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear probes stop after few iterations, for tests that do not check how good a score is."""
    programs.shorten_probes(monkeypatch)


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have blank pictures, because drawing one takes half a second.

    This does not reach the reports that module fixtures write.
    """
    draw_small(monkeypatch, dpi=0)


def draw_small(patch: pytest.MonkeyPatch, dpi: int) -> None:
    """Makes the pictures of reports blank. With a `dpi`, each is drawn once and discarded."""
    from hjepa_jax.reporting import publish  # here, because matplotlib loads slowly

    blank = io.BytesIO()
    Image.new("RGB", (1, 1)).save(blank, "png")

    def png(figure: Any, *, dark: bool = False) -> bytes:
        if dpi and not dark:
            figure.set_dpi(dpi)
            figure.canvas.draw()
        return blank.getvalue()

    patch.setattr(publish, "png", png)


@pytest.fixture(scope="session")
def shapes_npz(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of 240 + 60 images of 16x16 pixels, as a value of `data.source`.

    The images are small, because the time of a raw-pixel probe is cubic in the number of pixels.
    """
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    splits = create_shapes(240, 60, seed=2)
    save_npz(path, *(Split(split.images[:, ::2, ::2], split.labels) for split in splits))
    return f"npz:{path}"


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A data set of 160 + 40 files of 32x32 pixels, with a folder for each class."""
    root = tmp_path_factory.mktemp("shapes_folder")
    for name, split in zip(("train", "test"), create_shapes(160, 40, seed=1), strict=True):
        for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = root / name / f"{label:02}" / f"{i:03}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


@pytest.fixture
def tiny_config(shapes_npz: str) -> Config:
    """The config of `make_tiny_config`. Each test has its own copy and may change it."""
    return make_tiny_config(shapes_npz)


def make_tiny_config(source: str) -> Config:
    """Returns the config of a run of a few seconds: 6 steps that use every part of the loop."""
    c = base_config()
    c.data.source = source
    c.data.image_size = 16
    c.model.width, c.model.depth, c.model.num_heads = 16, 1, 2
    c.model.num_summary_tokens = 2
    c.model.predictor_width, c.model.predictor_depth, c.model.predictor_num_heads = 8, 1, 2
    c.mask.num_blocks = 2
    c.mask.scale = (0.25, 0.25)
    c.train.batch_size = 16
    c.train.num_steps = 6
    c.train.checkpoint_every_steps = 3
    c.eval.every_epochs = 0.4  # an epoch has 15 steps, so it evaluates after step 6
    c.eval.num_val = 40
    c.eval.knn_bank_size = 100
    c.eval.batch_size = 60
    c.eval.probe_at_end = False
    c.log.every_steps = 2
    c.log.tensorboard = False
    c.log.report = False
    return c.lock()


@pytest.fixture(scope="session")
def tiny_run(shapes_npz: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The work directory of a finished run of `tiny_config`, for tests to copy."""
    from hjepa_jax.training import train

    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    train.train_and_evaluate(make_tiny_config(shapes_npz), workdir)
    return workdir


@pytest.fixture(autouse=True)
def own_numbers(request):
    """Resets the RNG of the module, so that each test draws the same numbers in any order."""
    if (rng := getattr(request.module, "RNG", None)) is not None:
        first = vars(request.module).setdefault("_first_state", rng.bit_generator.state)
        rng.bit_generator.state = first


@pytest.fixture
def run_module():
    """Runs `python -m <module> <arguments>` as a user would; returns the finished process."""
    from tests.processes import run_command

    return run_command
