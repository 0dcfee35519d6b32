"""Compares one training step on this machine's accelerator with the same step on its CPU.

  python -m hjepa_jax.selftest [--steps=50] [--output=selftest.json]

The step is the one of configs/cifar10_patches.py. With the same key, weights and synthetic images,
masks must be equal, and loss and gradients must agree. The test also measures speed and the memory
growth per step. Exit status: 0 if everything agrees; 1 if not, naming the first difference. The
file holds all results, for a bug report.
"""

import dataclasses
import json
import pathlib
import platform as python_platform
import runpy
import sys
import time
from typing import Any

from absl import flags

from hjepa_jax import cli
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.paths import local_path

_STEPS = flags.DEFINE_integer("steps", 50, "Steps to measure speed and memory by.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "selftest.json", "The JSON file to write.")

CONFIG = pathlib.Path(__file__).parent / "configs" / "cifar10_patches.py"

# Float32 sums in another order differ in the sixth digit. Gradients differ more.
LOSS_TOLERANCE = 1e-4  # relative to the loss
GRADIENT_TOLERANCE = 1e-3  # relative to the Euclidean norm of a parameter's gradient
# The gradient of attention's key bias is zero except for rounding. Such a gradient is compared with
# this fraction of the gradient norm of all parameters.
NEGLIGIBLE = 1e-3


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Results of one training step, on the host.

    Attributes:
      masks: the `Masks` of the batch.
      loss: the training loss.
      grads: gradients after clipping, by parameter path.
    """

    masks: Any
    loss: float
    grads: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Check:
    """The error of a quantity. NaN never passes."""

    quantity: str
    error: float
    tolerance: float

    @property
    def passes(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


def compare(expected: StepResult, found: StepResult) -> list[Check]:
    """Compares every quantity of a step with the same step on another device.

    Errors: the fraction of mask entries that differ; the relative error of the loss; for each
    gradient, the norm of the difference over the norm of the expected gradient.
    """
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(expected.masks), jax.tree.leaves(found.masks), strict=True)
    differing = max(float(np.mean(a != b)) for a, b in pairs)
    checks = [
        Check("masks", differing, 0.0),
        Check("loss", abs(found.loss - expected.loss) / abs(expected.loss), LOSS_TOLERANCE),
    ]
    norms = {name: float(np.linalg.norm(g)) for name, g in expected.grads.items()}
    floor = NEGLIGIBLE * float(np.linalg.norm(list(norms.values())))
    for name, grad in expected.grads.items():
        error = float(np.linalg.norm(found.grads[name] - grad)) / max(norms[name], floor)
        checks.append(Check(f"gradient of {name}", error, GRADIENT_TOLERANCE))
    return checks


def self_test(config: Any, *, num_steps: int) -> dict[str, Any]:
    """Runs the test on the default backend.

    Args:
      config: the config to train; noise replaces its data.
      num_steps: number of steps for the measurement of speed and memory.

    Returns:
      The report, as plain JSON: "verdict" ("pass" or the first failure), "passed", versions, all
      checks, "images_per_sec", "memory_growth_bytes_per_step", "peak_memory_bytes".
    """
    import jax
    import numpy as np

    from hjepa_jax.config import build
    from hjepa_jax.data.sides import pair
    from hjepa_jax.runtime import provenance
    from hjepa_jax.runtime.backend import PLUGINS, current_rules, version

    batch_size = config.train.batch_size
    schedules = build.build_schedules(config, 10 * batch_size)
    model, tx = build.build_model(config), build.build_optimizer(config, schedules)
    train_step = build.build_train_step(config, model, tx, schedules)
    shape = (batch_size, *pair(config.data.image_size), 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with jax.default_device(cpu):
        state = jax.jit(build.build_create_state(config, model, tx))()

    # By default some accelerators multiply float32 numbers with only 8 or 11 significant bits.
    with jax.default_matmul_precision("highest"):
        expected, found = (
            run_step(config, train_step, *jax.device_put((state, images), d)) for d in (cpu, device)
        )
    checks = compare(expected, found)
    wrong = next((check for check in checks if not check.passes), None)
    verdict = "pass" if wrong is None else (
        f"{wrong.quantity} on {device.device_kind} is off from the CPU's by {wrong.error:.2g}, "
        f"more than {wrong.tolerance:g}"
    )  # fmt: skip

    state, images = jax.device_put((state, images), device)
    plugins = {package: version(package) for package, _, _ in PLUGINS.values() if version(package)}
    return {
        "verdict": verdict,
        "passed": wrong is None,
        "backend": jax.default_backend().lower(),
        "rules": str(current_rules()),
        "device": device.device_kind,
        "system": f"{python_platform.platform()} {python_platform.machine()}",
        "versions": {**provenance.versions(), **plugins},
        "checks": [dataclasses.asdict(check) for check in checks],
        "batch_size": batch_size,
        **_measure(jax.jit(train_step), state, images, num_steps),
    }


def _measure(step: Any, state: Any, images: Any, num_steps: int) -> dict[str, float]:
    """Measures speed and memory of a compiled training step on the device of its arguments."""
    import jax

    from hjepa_jax.runs.progress import peak_memory_bytes

    (device,) = images.devices()
    for _ in range(3):  # compiles, and lets the allocator reach its final size
        state, _ = step(state, images)
    jax.block_until_ready(state)
    before, started = peak_memory_bytes(device), time.perf_counter()
    for _ in range(num_steps):
        state, _ = step(state, images)
    jax.block_until_ready(state)
    seconds, after = time.perf_counter() - started, peak_memory_bytes(device)
    return {
        "steps": num_steps,
        "images_per_sec": num_steps * len(images) / seconds,
        "memory_growth_bytes_per_step": (after - before) / num_steps,
        "peak_memory_bytes": after,
    }


def run_step(config: Any, train_step: Any, state: Any, images: Any) -> StepResult:
    """Runs one training step on the device of its arguments."""
    import jax
    import numpy as np
    import optax

    from hjepa_jax.config import build
    from hjepa_jax.method.keys import image_rngs

    def masks_of(rng: Any) -> Any:
        _, mask_rngs = image_rngs(rng, state.step, len(images))
        return build.build_masks(config)(mask_rngs)

    masks = jax.jit(masks_of)(state.rng)
    new_state, outputs = jax.jit(train_step)(state, images)
    # After one update, Adam's first moment is (1 - b1) times the gradient, and Muon's momentum is
    # the gradient.
    grads = {}
    for name, factor in (("mu", 1 - config.optim.b1), ("momentum", 1.0)):
        moment = optax.tree_utils.tree_get(new_state.opt_state, name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(moment):
            grads[jax.tree_util.keystr(path)] = np.asarray(leaf, np.float64) / factor
    return StepResult(jax.device_get(masks), float(outputs.scalars["loss"]), grads)


def main() -> None:
    """Runs the command."""
    from hjepa_jax.runtime.backend import select_platform

    output = local_path("--output", _OUTPUT.value)
    backend = select_platform("auto")
    report = self_test(runpy.run_path(str(CONFIG))["get_config"](), num_steps=_STEPS.value)
    try:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        rule = f"must be a file that can be written ({error.strerror})"
        raise InputError("--output", _OUTPUT.value, rule) from error
    print(f"{report['device']}, {backend}" + f" ({report['rules']})" * bool(report["rules"]))
    print(", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    growth = report["memory_growth_bytes_per_step"] / 1e6
    print(
        f"{report['images_per_sec']:.0f} images/s in batches of {report['batch_size']}, peak "
        f"memory {report['peak_memory_bytes'] / 1e9:.2f} GB, growing by {growth:.3f} MB a step"
    )
    if not report["passed"]:
        print(f"FAIL: {report['verdict']}; please attach {output} to a report", file=sys.stderr)
        sys.exit(1)
    same = " (the CPU against itself: no accelerator is in use)" if backend == "cpu" else ""
    print(f"PASS: masks equal, loss and gradients agree{same}; details in {output}")


if __name__ == "__main__":
    cli.run(main)
