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
    """A directory that is gone when this process is."""
    path = tempfile.mkdtemp(prefix=f"hjepa_jax_{what}_")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tiny programs spend their time in the compiler: let it try less hard. At level 0 the compiler of
# jaxlib 0.5.0 gets integers wrong: masks then overlap and hold patches that there are not. That of
# 0.10.2 needs less than half its time without its newer emitters, which older ones do not know of.
FASTER = {
    "0.5.0": "--xla_backend_optimization_level=1",
    "0.10.2": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1",
}.get(importlib.metadata.version("jaxlib"), "--xla_backend_optimization_level=0")
FASTER += " --xla_llvm_disable_expensive_passes=true --xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("XLA_FLAGS", FASTER)
# Programs that several tests (and the commands they start) compile alike are compiled once.
if importlib.metadata.version("jaxlib").startswith("0.5."):  # see `keep_compiled_programs`
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = temporary("cache")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["XDG_CACHE_HOME"] = temporary("home")
# Matplotlib's list of fonts takes seconds to make: once for all workers and commands.
if "MPLCONFIGDIR" not in os.environ:
    os.environ["MPLCONFIGDIR"] = temporary("matplotlib")
# There is a worker for each core: threads of NumPy and XLA would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where one reads what another is writing, it says so and compiles itself.
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
    """Before xdist hands the tests to its workers; see tests/suite.py."""
    suite.arrange(items)


@pytest.fixture(scope="session", autouse=True)
def shared_programs() -> Iterator[pytest.MonkeyPatch]:
    """Runs with the same program trace and compile it once, see tests/programs.py."""
    with pytest.MonkeyPatch.context() as patch:
        programs.share(patch)
        yield patch


@pytest.fixture
def own_programs(shared_programs: pytest.MonkeyPatch) -> Iterator[None]:
    """The runs of this test trace and compile everything by themselves."""
    shared_programs.undo()
    yield
    programs.share(shared_programs)


@pytest.fixture
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear probes of few iterations, for tests that do not ask how good a score is."""
    programs.shorten_probes(monkeypatch)


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have blank pictures, as drawing one takes half a second; not of module fixtures."""
    draw_small(monkeypatch, dpi=0)


def draw_small(patch: pytest.MonkeyPatch, dpi: int) -> None:
    """The pictures of reports are blank files. With a `dpi`, each is drawn once and thrown away."""
    from hjepa_jax.reporting import publish  # matplotlib takes its time to load

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
    """A data set of 240 + 60 images, 16x16, as `data.source` takes it.

    Small, for the probe of raw pixels takes the third power of their number.
    """
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    splits = create_shapes(240, 60, seed=2)
    save_npz(path, *(Split(split.images[:, ::2, ::2], split.labels) for split in splits))
    return f"npz:{path}"


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A data set of 160 + 40 files, 32x32, in a folder for each class."""
    root = tmp_path_factory.mktemp("shapes_folder")
    for name, split in zip(("train", "test"), create_shapes(160, 40, seed=1), strict=True):
        for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = root / name / f"{label:02}" / f"{i:03}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


@pytest.fixture
def tiny_config(shapes_npz: str) -> Config:
    """See `make_tiny_config`; each test may change its own."""
    return make_tiny_config(shapes_npz)


def make_tiny_config(source: str) -> Config:
    """A whole run of a few seconds: 6 steps, every part of the loop in use."""
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
    c.eval.every_epochs = 0.4  # 15 steps an epoch: after step 6
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
    """The finished workdir of a run of `tiny_config`, for tests to copy."""
    from hjepa_jax.training import train

    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    train.train_and_evaluate(make_tiny_config(shapes_npz), workdir)
    return workdir


@pytest.fixture(autouse=True)
def own_numbers(request):
    """Each test draws the same numbers from its module's RNG, whichever ran before it."""
    if (rng := getattr(request.module, "RNG", None)) is not None:
        first = vars(request.module).setdefault("_first_state", rng.bit_generator.state)
        rng.bit_generator.state = first


@pytest.fixture
def run_module():
    """Runs `python -m <module> <arguments>` as a user would; returns the finished process."""
    from tests.processes import run_command

    return run_command
