"""Apple's plugins accept the programs of every config: step, initial state, features and probes.

The networks have one block, because further blocks repeat the same operations. With jax 0.5.0, the
only version for jax-metal, the tests check jax-metal. With newer versions they check jax-mps.
"""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from hjepa_jax.config import build
from hjepa_jax.data.base import Source, SourceInfo
from hjepa_jax.data.folder import FolderRecords
from hjepa_jax.evaluation import attentive, logistic
from hjepa_jax.runs import run
from tests.metal.judge import refusals

PLATFORM = "METAL" if jax.__version__ == "0.5.0" else "mps"
REPOSITORY = pathlib.Path(__file__).parent.parent.parent
CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("[a-z]*.py"))
QUICK = "shapes_tiny"  # tests of the other configs are marked slow


class Step:
    """The training program of a run, in the form that `refusals` needs."""

    def __init__(self, config, *, streamed=False):
        size = 32 if "cifar" in config.data.source else config.data.image_size
        num = 10 * config.train.batch_size
        info = SourceInfo(num, num, (size, size, 3), tuple("0123456789"))
        records = FolderRecords(["none"] * num, size) if streamed else None
        built = run.build_run(config, Source("none", info, load=tuple, records=records))
        self._lower = built.lower

    def lower(self, *, lowering_platforms):
        return self._lower(steps_per_call=1, donate=False, platforms=lowering_platforms)


def create_state(config):
    schedules = build.build_schedules(config, 10 * config.train.batch_size)
    tx = build.build_optimizer(config, schedules)
    return build.build_create_state(config, build.build_model(config), tx)


def create(config):
    return jax.jit(create_state(config)).trace()


def embed(config):
    size, batch = config.data.image_size, config.eval.batch_size
    fn = build.build_embed_fn(config, build.build_model(config))
    params = jax.eval_shape(create_state(config)).target_params
    return jax.jit(fn).trace(params, jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8))


@pytest.mark.parametrize("program", [Step, create, embed])
@pytest.mark.parametrize(
    "name", [pytest.param(c, marks=() if c == QUICK else pytest.mark.slow) for c in CONFIGS]
)
def test_the_plugin_takes_every_program_of_every_config(name, program, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    config = importlib.import_module(f"hjepa_jax.configs.{name}").get_config()
    config.model.depth = config.model.predictor_depth = 1
    assert refusals(program(config), PLATFORM) == []


def test_the_plugin_takes_all_options_together(tiny_config):
    """One program has all options, because tracing takes seconds. A refusal names the operation."""
    tiny_config.optim.accumulation_steps, tiny_config.optim.kind = 2, "muon"
    tiny_config.mask.kind, tiny_config.loss.regularizer = "hierarchical", "sigreg"
    tiny_config.mask.progression = ("geometric", 1.0)  # so that level 1 fits the 4 x 4 patches
    for option in ("vertical_flip", "blur", "solarize"):
        tiny_config.data[option] = 0.5
    tiny_config.model.positions, tiny_config.model.pyramid = "rope2d", "concat"
    tiny_config.loss.agreement_weight = tiny_config.loss.teacher_weight = 1.0
    tiny_config.loss.spread_moment, tiny_config.data.hue = "running", 0.1
    tiny_config.model.projection_input, tiny_config.model.stem = "summary+patches", "hmlp"
    tiny_config.data.jitter_probability = 0.8
    tiny_config.data.local_views, tiny_config.data.local_size = 2, 8
    assert refusals(Step(tiny_config, streamed=True), PLATFORM) == []


def test_the_plugin_takes_random_masks(tiny_config):
    tiny_config.mask.kind = "random"
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    assert refusals(jax.jit(build.build_masks(tiny_config)).trace(keys), PLATFORM) == []


def test_the_plugin_takes_the_linear_probe():
    features, labels = jnp.zeros((8, 5)), jnp.zeros(8, jnp.int32)
    traced = logistic._losses.trace(features, labels, jnp.zeros((5, 3)))
    assert refusals(traced, PLATFORM) == []


def test_the_plugin_takes_the_attentive_probe():
    x, y, grid = jnp.zeros((4, 6, 8)), jnp.zeros(4, jnp.int32), jnp.ones(2)
    shapes = {"queries": (2, 3, 8), "kernel": (2, 24, 5), "bias": (2, 5)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    opt_state = jax.vmap(attentive.optax.scale_by_adam().init)(params)
    traced = attentive._update.trace(params, opt_state, x, y, grid, grid)
    assert refusals(traced, PLATFORM) == []
