"""Memory of a training step by batch size, with and without `model.remat`, as compiled.

Nothing is trained: the compiler states the needs of the program. ViT-S/16 at 224 x 224, otherwise
`m1_max_quick_val`, in bfloat16; on CPU its activations are float32 all the same. Writes memory.csv
beside this file.

  PYTHONPATH=. python experiments/throughput/memory.py
"""

import csv
import pathlib

import jax
import jax.numpy as jnp

from hjepa_jax.config import build
from hjepa_jax.configs import m1_max_quick_val
from hjepa_jax.runtime import backend

BATCH_SIZES = (32, 64, 128, 256)


def measure(batch_size: int, *, remat: bool) -> dict:
    """Returns GiB of the state (with a batch of images), and of the step's temporaries."""
    config = m1_max_quick_val.get_config()
    config.update_from_flattened_dict(
        {
            "model.name": "vit_small",
            "model.remat": remat,
            "model.dtype": "bfloat16",
            "train.batch_size": batch_size,
        }
    )
    schedules = build.build_schedules(config, 50_000)
    model, tx = build.build_model(config), build.build_optimizer(config, schedules)
    step = build.build_train_step(config, model, tx, schedules)
    state = jax.eval_shape(build.build_create_state(config, model, tx))
    images = jax.ShapeDtypeStruct((batch_size, 32, 32, 3), jnp.uint8)
    found = jax.jit(step, donate_argnums=0).lower(state, images).compile().memory_analysis()
    return {
        "model": "ViT-S/16 at 224", "dtype": "bfloat16", "batch_size": batch_size, "remat": remat,
        "state_gib": round(found.argument_size_in_bytes / 2**30, 3),
        "step_gib": round(found.temp_size_in_bytes / 2**30, 2), "backend": jax.default_backend(),
        "jax": jax.__version__,
    }  # fmt: skip


def main() -> None:
    backend.select_platform("auto")
    rows = [
        measure(batch_size, remat=remat) for batch_size in BATCH_SIZES for remat in (False, True)
    ]
    with pathlib.Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
