"""How fast the matrix products of a training step run when nothing else does.

Every product of the step's program is timed by itself, in its own shapes. Their sum is the time
that the step would take if all the rest were free: the ceiling that the step is measured against.

  python experiments/throughput/ceiling.py --config=configs/cifar10_patches.py
"""

import collections
import functools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from hjepa_jax import cli
from hjepa_jax.config import build
from hjepa_jax.runtime import backend

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Calls per product; the median counts.")


def products(jaxpr, times=1):
    """Operands, dimension numbers and results of all dot_generals, and how often each is run."""
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            lhs, rhs = (v.aval for v in eqn.invars)
            result = eqn.params["preferred_element_type"] or lhs.dtype
            found[
                lhs.shape, str(lhs.dtype), rhs.shape, eqn.params["dimension_numbers"], str(result)
            ] += times
        inner_times = times * eqn.params.get("length", 1)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += products(inner, inner_times)
    return found


def num_flops(lhs, rhs, dimension_numbers):
    (contracting, _), (batch, rhs_batch) = dimension_numbers
    rest = math.prod(n for i, n in enumerate(lhs) if i not in (*contracting, *batch))
    rhs_contracting = dimension_numbers[0][1]
    columns = math.prod(n for i, n in enumerate(rhs) if i not in (*rhs_contracting, *rhs_batch))
    inner = math.prod(lhs[i] for i in contracting)
    return 2 * math.prod(lhs[i] for i in batch) * rest * columns * inner


def main() -> None:
    config = _CONFIG.value
    backend.select_platform(config.platform)
    schedules = build.build_schedules(config, 50_000)
    model, tx = build.build_model(config), build.build_optimizer(config, schedules)
    step = build.build_train_step(config, model, tx, schedules)
    state = jax.eval_shape(build.build_create_state(config, model, tx))
    images = jax.ShapeDtypeStruct((config.train.batch_size, 32, 32, 3), jnp.uint8)
    rng = np.random.default_rng(0)
    total_sec, total_flops = 0.0, 0
    found = products(jax.make_jaxpr(step)(state, images))
    for (lhs, dtype, rhs, numbers, result), count in found.items():
        a, b = (jnp.asarray(rng.normal(size=s), dtype) for s in (lhs, rhs))
        product = jax.jit(
            functools.partial(
                jax.lax.dot_general, dimension_numbers=numbers, preferred_element_type=result
            )
        )
        product(a, b).block_until_ready()
        seconds = []
        for _ in range(_REPEATS.value):
            started = time.perf_counter()
            product(a, b).block_until_ready()
            seconds.append(time.perf_counter() - started)
        total_sec += count * float(np.median(seconds))
        total_flops += count * num_flops(lhs, rhs, numbers)
    print(json.dumps({"products_sec": total_sec, "products_flops": total_flops,
                      "flops_per_sec": total_flops / total_sec}))  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
