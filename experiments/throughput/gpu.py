"""Our bare `train_step` and PyTorch's on one GPU, by model and batch: gpu.csv, gpu_kernels.csv.

  python experiments/throughput/gpu.py --compile_only --seconds=300  # fills the caches
  python experiments/throughput/gpu.py --seconds=150 --commit=$(git rev-parse --short HEAD)

Every model has a process of ours and one of PyTorch. All start together and compile, from filled
caches if there are any. Then they time one case after the other, so that the device has one thing
to do. The first batch size is PyTorch's too. Steps are timed in groups: a group is enqueued as a
whole, and the program waits for its last step. A case that fails has an `error`. gpu.csv is written
anew after every case; rows of earlier runs are kept.

Columns: `masks`: how PyTorch samples them, see torch_baseline.py. `flops_per_image`: as lowered
for the CPU, before the compiler. `program_bytes`: arguments, results and temporaries of this
program. `peak_memory_bytes`: of the process so far, including earlier batches (in the order of the
rows). `compile_sec`: while the others compiled, or from the cache. `compiling`: processes that
still compiled while this case was timed; if it is not 0, distrust the case.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time

import gpu_cases
import numpy as np
from gpu_cases import MARK, MODELS

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
TORCH = {"eager": "PyTorch", "compiled": "PyTorch, compiled"}
KEY = ["model", "contender", "masks", "batch_size", "hardware", "commit"]
COLUMNS = [
    *KEY, "images_per_sec", "step_sec", "step_sec_p25", "step_sec_p75", "num_groups",
    "steps_per_group", "flops_per_image", "tflops_per_sec", "ceiling_tflops_per_sec",
    "ceiling_share", "over_torch_eager", "over_torch_compiled", "over_torch_eager_masks_ahead",
    "over_torch_compiled_masks_ahead", "compile_sec", "program_bytes", "peak_memory_bytes", "loss",
    "compiling", "jax", "torch", "error",
]  # fmt: skip
KERNEL_KEY = ["model", "batch_size", "rank", "hardware", "commit"]
KERNEL_COLUMNS = [
    *("model", "batch_size", "rank", "kernel", "num_events", "kernel_sec", "share"),
    *("all_kernels_sec", "device_span_sec", "wall_sec", "num_steps", "hardware", "commit", "error"),
]


class Child:
    """A process that serves; `ready` is its description of itself, None until it comes."""

    def __init__(self, who: str, model: str, batches: list[int]) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
            "TORCHINDUCTOR_COMPILE_THREADS": "3",  # in each process
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
                "TORCHINDUCTOR_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir(), "inductor"))
            ),
        }  # fmt: skip
        spec = json.dumps({"who": who, "model": model, "batches": batches})
        self.name, self.ready, self.answers = f"{who} {model}", None, queue.Queue()
        # Open as long as the process runs.
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, gpu_cases.__file__, spec],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=environment, cwd=REPOSITORY,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            if line.startswith(MARK):
                self.answers.put(json.loads(line[len(MARK) :]))
        self.log.seek(0)
        self.answers.put({"error": "died: " + " ".join(self.log.read()[-400:].split())})

    def wait_ready(self, seconds: float) -> bool:
        """Whether it is ready, within so many seconds."""
        if self.ready is None:
            try:
                self.ready = self.answers.get(timeout=max(0.0, seconds))
            except queue.Empty:
                return False
            if self.ready.get("error") or self.ready.get("errors"):
                print(f"{self.name}: {self.ready}", flush=True)
        return True

    def ask(self, request: dict, seconds: float) -> dict:
        """Its answer; a process that takes too long for it is ended."""
        if not self.wait_ready(seconds):
            self.end()
            return {"error": "was not ready"}
        if self.process.poll() is not None:
            return {"error": "had died"}
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return self.answers.get(timeout=max(1.0, seconds))
        except OSError:
            return {"error": "died"}
        except queue.Empty:
            self.end()
            return {"error": f"took more than {seconds:.0f} s"}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Table:
    """Rows by their key, of earlier runs too; written after every case."""

    def __init__(self, path: pathlib.Path, key: list[str], columns: list[str]) -> None:
        self.path, self.key, self.columns, self.rows = path, key, columns, {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self.rows[self._key(row)] = row

    def _key(self, row: dict) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in self.key)

    def add(self, row: dict) -> None:
        self.rows[self._key(row)] = row

    def get(self, row: dict) -> dict:
        """Returns the row with the same key, or an empty one."""
        return self.rows.get(self._key(row), {})

    def write(self) -> None:
        new = self.path.with_suffix(".part")
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows.values())
        new.replace(self.path)


def row_of(answer: dict, batch: int, ceiling: float) -> dict:
    """The columns of one answer."""
    if "sec" not in answer:
        return answer
    step_sec, low, high = (float(np.percentile(answer["sec"], q)) for q in (50, 25, 75))
    row = answer | {
        "num_groups": len(answer["sec"]), "images_per_sec": round(batch / step_sec, 1),
        "step_sec": f"{step_sec:.6f}", "step_sec_p25": f"{low:.6f}", "step_sec_p75": f"{high:.6f}",
    }  # fmt: skip
    if flops := answer.get("flops_per_image"):
        rate = flops * batch / step_sec
        row |= {"flops_per_image": int(flops), "tflops_per_sec": round(rate / 1e12, 1)}
        if ceiling:
            row["ceiling_tflops_per_sec"] = round(ceiling / 1e12, 1)
            row["ceiling_share"] = round(rate / ceiling, 3)
    return row


def add_ratios(table: Table) -> None:
    """Fills in ours over PyTorch, in rows of the same model, batch, hardware and commit."""
    for row in table.rows.values():
        for name, contender in TORCH.items():
            for suffix, masks in (("", "in step"), ("_masks_ahead", "ahead")):
                other = row | {"contender": contender, "masks": masks}
                rate = table.get(other).get("images_per_sec")
                if row["contender"] == "ours" and row.get("images_per_sec") and rate:
                    ratio = float(row["images_per_sec"]) / float(rate)
                    row[f"over_torch_{name}{suffix}"] = round(ratio, 2)


class Measurement:
    """Asks the children for one case after the other, and writes their answers."""

    def __init__(self, args, children: dict, deadline: float) -> None:
        self.args, self.children, self.deadline = args, children, deadline
        self.timing = {k: getattr(args, k) for k in ("steps", "groups", "case_seconds")}
        self.table = Table(args.out / "gpu.csv", KEY, COLUMNS)
        self.kernels = Table(args.out / "gpu_kernels.csv", KERNEL_KEY, KERNEL_COLUMNS)
        self.about = {"commit": args.commit, "hardware": "", "jax": version("jax")}
        self.about["torch"] = version("torch")
        for child in children.values():
            self.about["hardware"] = (child.ready or {}).get("hardware") or self.about["hardware"]
        self.ceiling = 0.0
        for who, model in children:
            if who == "ours" and not self.ceiling and children[who, model].wait_ready(0):
                request = {"do": "ceiling", "size": args.ceiling_size, "steps": 50, "groups": 10}
                answer = self.ask(who, model, "ceiling", request) or {}
                self.ceiling = answer.get("flops_per_sec", 0.0)
                print(f"bfloat16 products: {answer}", flush=True)

    def ask(self, who: str, model: str, what: str, request: dict) -> dict | None:
        """Returns the answer of a child; None if no time is left."""
        left, child = self.deadline - time.monotonic(), self.children[who, model]
        if left < 2 + 2.5 * self.args.case_seconds:
            print(f"{what}: skipped: no time", flush=True)
            return None
        return child.ask(self.timing | request, min(left, 25 + 4 * self.args.case_seconds))

    def case(self, who: str, model: str, batch: int, *, name="", masks="in step") -> None:
        """Times one step of ours, or of PyTorch's `name`."""
        contender = TORCH.get(name, "ours")
        what = f"{model}, batch {batch}, {contender}, masks {masks}"
        compiling = sum(not child.wait_ready(0) for child in self.children.values())
        request = {"do": "case", "batch": batch, "name": name, "masks": masks}
        answer = self.ask(who, model, what, request)
        if answer is None:
            return
        row = {"model": model, "contender": contender, "masks": masks, "batch_size": batch}
        row |= row_of(answer, batch, self.ceiling) | self.about | {"compiling": compiling}
        self.table.add(row)
        add_ratios(self.table)
        self.table.write()
        said = "{images_per_sec} images/s, step {step_sec} s".format_map(row) if (
            "images_per_sec" in row) else row["error"]  # fmt: skip
        print(f"{what}: {said}, share of ceiling {row.get('ceiling_share')}", flush=True)

    def profile(self, model: str, batch: int) -> None:
        """The ten kernels that our step spends the most time in."""
        answer = self.ask("ours", model, f"{model}, profile", {"do": "profile", "batch": batch})
        if answer is None:
            return
        common = {"model": model, "batch_size": batch} | self.about | answer
        for rank, (kernel, (number, sec)) in enumerate(answer.get("top", [["", [0, 0.0]]]), 1):
            row = common | {"rank": rank, "kernel": kernel[:200], "num_events": number}
            share = round(sec / answer.get("all_kernels_sec", 1.0), 4)
            self.kernels.add(row | {"kernel_sec": f"{sec:.6f}", "share": share})
            print(f"{model}, profile: {share} {kernel[:100]} {answer.get('error', '')}", flush=True)
        self.kernels.write()

    def model(self, model: str, batches: list[int]) -> None:
        """All cases of one model; its processes end."""

        def torch() -> None:
            if ("torch", model) not in self.children:
                return
            for name in ("compiled", "eager"):
                for masks in ("in step", "ahead"):
                    self.case("torch", model, batches[0], name=name, masks=masks)
            self.children.pop(("torch", model)).end()

        if MODELS[model].torch_first:
            torch()
        self.case("ours", model, batches[0])
        torch()
        for batch in batches[1:]:
            self.case("ours", model, batch)
        if MODELS[model].profiled:
            self.profile(model, batches[0])
        self.children.pop(("ours", model)).end()


def version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else ""


def run(args) -> None:
    now, children = time.monotonic(), {}
    deadline = now + args.seconds
    ready_by = now + (args.seconds if args.compile_only else args.prepare_seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    batches = {model: args.batches or list(MODELS[model].batches) for model in args.models}
    try:
        for model in args.models:
            for who in ["ours", "torch"] if version("torch") else ["ours"]:
                children[who, model] = Child(who, model, batches[model])
        for child in children.values():
            ready = child.wait_ready(ready_by - time.monotonic())
            print(f"{child.name}: {'' if ready else 'not '}ready after "
                  f"{time.monotonic() - now:.0f} s", flush=True)  # fmt: skip
        if not args.compile_only:
            measurement = Measurement(args, children, deadline)
            ready_first = lambda model: not children["ours", model].wait_ready(0)  # noqa: E731
            for model in sorted(args.models, key=ready_first):
                measurement.model(model, batches[model])
    finally:
        for child in children.values():
            child.end()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile_only", action="store_true")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, help="the first is PyTorch's too")
    parser.add_argument("--seconds", type=float, default=150, help="after which nothing runs")
    parser.add_argument("--prepare_seconds", type=float, default=80, help="for compiling")
    parser.add_argument("--case_seconds", type=float, default=1.5, help="about, of each case")
    parser.add_argument("--steps", type=int, default=10, help="at most, in a group")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--ceiling_size", type=int, default=8192)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
