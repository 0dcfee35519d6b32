"""Weak and strong scaling over virtual devices and processes of one machine: results.csv.

    PYTHONPATH=. python experiments/scaling/scaling.py [--rounds=3]

Every layout runs in processes of its own, one layout after the other. The rounds go through all
layouts, so that other work on the machine meets all alike. Ratios compare the fastest steps of any
round, because other work can only make a step slower.
"""

import csv
import json
import pathlib
import socket
import subprocess
import sys

import numpy as np
from absl import flags

from hjepa_jax import cli

_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each layout is measured.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps timed in a round.")

HERE = pathlib.Path(__file__).parent
# processes, devices in all, fsdp
LAYOUTS = ((1, 1, 1), (1, 2, 1), (1, 4, 1), (1, 8, 1), (1, 8, 8), (2, 2, 1), (2, 8, 1))
STRONG, WEAK = 64, 8  # images per step, and per step and device


def measure(num_processes: int, devices: int, fsdp: int, batch_size: int) -> dict:
    """What `worker.py` says of a layout."""
    command = [
        sys.executable, str(HERE / "worker.py"), f"--devices={devices // num_processes}",
        f"--fsdp={fsdp}", f"--batch_size={batch_size}", f"--steps={_STEPS.value}",
    ]  # fmt: skip
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command += [f"--coordinator={address}", f"--num_processes={num_processes}"]
    workers = [
        subprocess.Popen(
            [*command, *([f"--process_id={i}"] if num_processes > 1 else [])],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(num_processes)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    """Runs the command."""
    cases = [
        (kind, *layout, STRONG if kind == "strong" else WEAK * layout[1])
        for kind in ("strong", "weak")
        for layout in LAYOUTS
    ]
    programs = dict.fromkeys(case[1:] for case in cases)  # with 8 devices both kinds are the same
    seconds, last = {program: [] for program in programs}, {}
    for _ in range(_ROUNDS.value):
        for program in programs:
            last[program] = measure(*program)
            seconds[program] += last[program]["sec"]
            print(program, f"{min(seconds[program]):.4f} s", flush=True)
    rows = []
    for kind, *program in cases:
        num_processes, devices, fsdp, batch_size = case = tuple(program)
        first = next(tuple(c[1:]) for c in cases if c[0] == kind)
        fastest = min(seconds[case])
        ratio = batch_size / fastest * min(seconds[first]) / first[-1]
        rows.append({
            "scaling": kind, "processes": num_processes, "devices": devices, "fsdp": fsdp,
            "batch_size": batch_size, "steps": len(seconds[case]),
            "median_step_sec": round(float(np.median(seconds[case])), 4),
            "fastest_step_sec": round(fastest, 4), "images_per_sec_ratio": round(ratio, 2),
            "state_bytes_per_device": last[case]["state_bytes_per_device"],
            **{
                f"{operation}_{what}": last[case]["collectives"].get(operation, {}).get(what, 0)
                for operation in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
                for what in ("count", "bytes")
            },
        })  # fmt: skip
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    cli.run(main)
