"""Predicts steps on 8, 64 and 512 accelerators from stated assumptions: plan.csv.

    PYTHONPATH=. python experiments/scaling/plan.py

FLOPs and parameters come from the lowered training step of this code. Everything under
`Assumptions` comes from data sheets or is assumed, and is not measured here.
"""

import csv
import dataclasses
import math
import pathlib

import jax
from worker import build

from hjepa_jax.runs.run import num_params


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """An accelerator of the H100's class, eight to a host.

    Attributes:
      flops: peak of dense bfloat16 products, FLOP/s.
      efficiency: fraction of that peak which the step reaches, by model.
      per_host: accelerators of a host.
      inside: bytes/s that an accelerator sends within its host (NVLink, one direction).
      between: bytes/s that it sends to other hosts (one 400 Gb/s adapter each).
      reached: fraction of either that collectives reach.
      image_bytes: of a stored image (JPEG of ImageNet's size).
      images_per_core: decoded and resized by a core, images/s.
    """

    flops: float = 989e12
    efficiency: tuple[tuple[str, float], ...] = (
        ("vit_small", 0.25), ("vit_base", 0.35), ("vit_large", 0.4),
    )  # fmt: skip
    per_host: int = 8
    inside: float = 450e9
    between: float = 50e9
    reached: float = 0.8
    image_bytes: float = 110e3
    images_per_core: float = 150.0


def exchange_sec(
    params: float, targets: float, num: int, *, fsdp: int, given: Assumptions
) -> float:
    """Returns the seconds of all collectives of a step, one after the other.

    Args:
      params: bytes of the trained parameters; gradients are as large.
      targets: bytes of the EMA.
      num: accelerators.
      fsdp: accelerators that share a copy; 1, or all of a host.
      given: the assumptions.
    """
    inside, between = given.inside * given.reached, given.between * given.reached
    num_hosts = max(1, num // given.per_host)
    local = min(num, given.per_host)
    ring = (local - 1) / local
    # Gradients: reduce-scatter in the host, all-reduce of each part between hosts; then either an
    # all-gather of gradients (fsdp 1), or of updated parameters and EMA in the next step.
    gathered = params if fsdp == 1 else params + targets
    seconds = ring * (params + gathered) / inside
    return seconds + 2 * (num_hosts - 1) / num_hosts * (params / local) / between


def predict(model: str, given: Assumptions) -> list[dict]:
    """A row for every number of accelerators, way of scaling and fsdp."""
    built = build(model, fsdp=1, batch_size=2)
    flops = built.lower(steps_per_call=1, donate=False).cost_analysis()["flops"] / 2
    state, _ = jax.eval_shape(built.create)
    params, targets = 4 * num_params(state.params), 4 * num_params(state.target_params)
    whole = 3 * params + targets  # Adam keeps two moments
    rows = []
    for num in (8, 64, 512):
        for scaling, batch in (("weak, 128 each", 128), ("strong, 4096 in all", 4096 // num)):
            for fsdp in (1, given.per_host):
                compute = flops * batch / (given.flops * dict(given.efficiency)[model])
                exchange = exchange_sec(params, targets, num, fsdp=fsdp, given=given)
                rate = num * batch / (compute + exchange)  # nothing overlaps
                rows.append({
                    "model": model, "params_million": round(params / 4e6, 1),
                    "gflop_per_image": round(flops / 1e9, 1), "accelerators": num,
                    "scaling": scaling, "batch_per_accelerator": batch, "fsdp": fsdp,
                    "compute_ms": round(1e3 * compute, 2), "exchange_ms": round(1e3 * exchange, 2),
                    "efficiency_without_overlap": round(compute / (compute + exchange), 3),
                    "images_per_sec": round(rate), "state_gb": round(whole / fsdp / 1e9, 2),
                    "input_gb_per_sec_and_host": round(
                        rate / num * given.per_host * given.image_bytes / 1e9, 2
                    ),
                    "decoding_cores_per_host": math.ceil(
                        rate / num * given.per_host / given.images_per_core
                    ),
                })  # fmt: skip
    return rows


def main() -> None:
    """Runs the command."""
    rows = [row for model, _ in Assumptions().efficiency for row in predict(model, Assumptions())]
    path = pathlib.Path(__file__).parent / "plan.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(path.read_text())


if __name__ == "__main__":
    main()
