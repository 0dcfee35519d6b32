"""Images per second of our training loop, our bare step, and PyTorch, measured in turns.

Each contender runs in a process of its own; in every round each has its turn, so that other work
on the machine falls on all alike. Writes results.csv and throughput.png beside this file.

  pip install -r experiments/throughput/requirements.txt
  python experiments/throughput/throughput.py --rounds=3
"""

import argparse
import csv
import json
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parent.parent
COLUMNS = [
    "config", "contender", "dtype", "batch_size", "images_per_sec", "step_sec", "step_sec_p25",
    "step_sec_p75", "num_timed", "compile_sec", "peak_memory_bytes", "flops_per_image",
    "ceiling_flops_per_sec", "ceiling_share", "over_torch_float32", "over_torch_best", "hardware",
    "commit",
]  # fmt: skip


def contenders(config: str, num_steps: int, cpu_devices: int) -> dict[tuple[str, str], list[str]]:
    """Commands by (who, dtype)."""
    commands = {}
    for dtype in ("float32", "bfloat16"):
        for kind in ("step", "loop"):
            commands[f"our {kind}", dtype] = [
                "ours.py", f"--config=configs/{config}.py", f"--kind={kind}",
                f"--steps={num_steps}", f"--config.model.dtype={dtype}",
                f"--config.parallel.cpu_devices={cpu_devices}",
                "--config.model.positions=learned",  # as in the baseline
            ]  # fmt: skip
        torch = ["torch_baseline.py", f"--config={config}", f"--mode={dtype}"]
        torch += [f"--steps={max(3, num_steps // 3)}"]
        commands["PyTorch", dtype] = torch
        commands["PyTorch, compiled", dtype] = [*torch, "--compile"]
    return commands


def measure(command: list[str]) -> dict:
    """Runs one contender once; its line of JSON."""
    done = subprocess.run(
        [sys.executable, str(HERE / command[0]), *command[1:]],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def hardware() -> str:
    """Returns the name of the GPU if jax has one, or of the processor."""
    import jax

    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    names = [
        line.split(":")[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def rows_of(config: str, results: dict, ceiling: dict, about: dict) -> Iterator[dict]:
    """One row per contender, with its ratio to PyTorch."""
    rates = {}
    for who, runs in results.items():
        seconds = np.concatenate([run["sec"] for run in runs])
        rates[who] = runs[0]["batch_size"] / float(np.median(seconds))
    best = max((rate for (name, _), rate in rates.items() if "PyTorch" in name), default=np.nan)
    for (name, dtype), runs in results.items():
        seconds = np.concatenate([run["sec"] for run in runs])
        row = {
            "config": config, "contender": name, "dtype": dtype,
            "batch_size": runs[0]["batch_size"], "num_timed": len(seconds),
            "images_per_sec": round(rates[name, dtype], 2),
            "step_sec": round(float(np.median(seconds)), 4),
            "step_sec_p25": round(float(np.percentile(seconds, 25)), 4),
            "step_sec_p75": round(float(np.percentile(seconds, 75)), 4),
            "peak_memory_bytes": int(max(run["peak_memory_bytes"] for run in runs)),
            "over_torch_float32": round(rates[name, dtype] / rates["PyTorch", "float32"], 2),
            "over_torch_best": round(rates[name, dtype] / best, 2),
            **about,
        }  # fmt: skip
        if "compile_sec" in runs[0]:
            row["compile_sec"] = round(max(run["compile_sec"] for run in runs), 1)
        if "flops_per_image" in runs[0]:
            flops = runs[0]["flops_per_image"]
            row |= {"flops_per_image": int(flops)}
            if dtype in ceiling:
                peak = float(np.median(ceiling[dtype]))
                share = flops * rates[name, dtype] / peak
                row |= {"ceiling_flops_per_sec": round(peak), "ceiling_share": round(share, 3)}
        yield row


def draw(rows: list[dict]) -> None:
    """Images per second of each contender, one panel per config."""
    configs = list(dict.fromkeys(row["config"] for row in rows))
    figure, axes = pyplot.subplots(1, len(configs), figsize=(5.5 * len(configs), 3.6))
    for axis, config in zip(np.atleast_1d(axes), configs, strict=True):
        mine = [row for row in rows if row["config"] == config][::-1]
        colours = ["#0072b2" if row["contender"].startswith("our") else "#d55e00" for row in mine]
        bars = axis.barh(
            [f"{row['contender']}, {row['dtype']}" for row in mine],
            [float(row["images_per_sec"]) for row in mine],
            color=colours,
        )
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.margins(x=0.15)
        axis.set_xlabel("images per second")
        axis.set_title(f"{config}, batch {mine[0]['batch_size']}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(rows[0]["hardware"], fontsize=9)
    figure.tight_layout()
    figure.savefig(HERE / "throughput.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--configs", nargs="+", default=["m1_max_quick_val", "cifar10_patches"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--cpu_devices", type=int, default=1)
    parser.add_argument("--leave_out", help="contenders whose name and dtype hold this")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    about = {"hardware": hardware(), "commit": commit}
    rows = []
    for config in args.configs:
        commands = contenders(config, args.steps, args.cpu_devices)
        if args.leave_out:
            commands = {k: v for k, v in commands.items() if args.leave_out not in ", ".join(k)}
        results, ceiling = {k: [] for k in commands}, {"float32": [], "bfloat16": []}
        for round_number in range(args.rounds):
            for who, command in commands.items():
                results[who].append(measure(command))
                rate = results[who][-1]["batch_size"] / np.median(results[who][-1]["sec"])
                print(f"{config} round {round_number + 1} {', '.join(who)}: {rate:.1f} images/s",
                      flush=True)  # fmt: skip
            for dtype, found in ceiling.items():
                flags = [f"--config=configs/{config}.py", f"--config.model.dtype={dtype}"]
                found.append(measure(["ceiling.py", *flags])["flops_per_sec"])
                print(f"{config} round {round_number + 1} products alone, {dtype}: "
                      f"{found[-1] / 1e9:.0f} GFLOP/s", flush=True)  # fmt: skip
        rows += rows_of(config, results, ceiling, about)
        with (HERE / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)
    draw(rows)


if __name__ == "__main__":
    main()
