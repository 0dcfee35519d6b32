"""A process of gpu.py: compiles the steps of one model, and times or profiles them on request.

Not to be called by hand: gpu.py starts it with a JSON description of the model, and then writes
requests, one line of JSON each, to its stdin.
"""

import dataclasses
import gc
import importlib
import json
import pathlib
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

MARK = "@@"  # begins a line of an answer; libraries print too


@dataclasses.dataclass(frozen=True)
class Model:
    """A row of the table; `size` and `predictor` (width, heads) override the config."""

    config: str
    batches: tuple[int, ...]  # the first is PyTorch's too
    size: str | None = None
    predictor: tuple[int, int] | None = None
    profiled: bool = False
    torch_first: bool = False  # ours keeps its memory while it lives: both would not fit


MODELS = {  # by importance
    "vit_tiny_32": Model("cifar10_patches", (1024, 4096), profiled=True),
    "vit_small_32": Model("cifar10_patches", (1024, 4096), "vit_small", (192, 3)),
    "vit_tiny_224": Model("m1_max_quick_val", (256, 1024), "vit_tiny"),
    "vit_small_224": Model("m1_max_quick_val", (256, 512), "vit_small", (384, 6), profiled=True),
    "vit_base_224": Model("m1_max_quick_val", (256,), "vit_base", (384, 6), torch_first=True),
}


def time_groups(step, wait, request) -> dict:
    """Seconds per step of groups of steps; `wait(step())` returns when the device has done it."""
    for _ in range(3):  # what is loaded or chosen at the first calls
        started = time.perf_counter()
        loss = wait(step())
        one = time.perf_counter() - started
    steps = int(min(max(request["case_seconds"] / request["groups"] / one, 1), request["steps"]))
    seconds = []
    while len(seconds) < request["groups"] + 1:
        started = time.perf_counter()
        for _ in range(steps):
            out = step()
        loss = wait(out)
        seconds.append((time.perf_counter() - started) / steps)
        if len(seconds) > 3 and sum(seconds) * steps > 2 * request["case_seconds"]:
            break
    return {"sec": seconds[1:], "steps_per_group": steps, "loss": loss}  # the first warms up


def prepare_ours(spec):
    """Compiles our programs of one model; returns their facts, and a function for requests."""
    import jax
    import jax.numpy as jnp

    from hjepa_jax.config import build
    from hjepa_jax.runs.progress import peak_memory_bytes
    from hjepa_jax.runtime import backend

    model_spec = MODELS[spec["model"]]
    config = importlib.import_module(f"hjepa_jax.configs.{model_spec.config}").get_config()
    config.model.name = model_spec.size or config.model.name
    if model_spec.predictor:
        config.model.predictor_width, config.model.predictor_num_heads = model_spec.predictor
    config.model.dtype, config.model.positions = "bfloat16", "learned"  # as in the baseline
    backend.select_platform(config.platform)  # which keeps compiled programs
    schedules = build.build_schedules(config, 50_000)
    model, tx = build.build_model(config), build.build_optimizer(config, schedules)
    step = build.build_train_step(config, model, tx, schedules)
    create_state = jax.jit(build.build_create_state(config, model, tx))
    programs = {}

    def compile_step(batch, lowered):
        started = time.perf_counter()
        compiled = lowered.compile()
        found = {"compile_sec": round(time.perf_counter() - started, 1)}
        with jax.default_device(jax.devices("cpu")[0]):  # on CUDA the analysis misses the products
            found["flops_per_image"] = lower(batch).cost_analysis()["flops"] / batch
        if memory := compiled.memory_analysis():
            parts = ("argument_size", "output_size", "temp_size")
            size = sum(getattr(memory, f"{part}_in_bytes") for part in parts)
            found["program_bytes"] = size - memory.alias_size_in_bytes
        programs[batch] = compiled, found

    def lower(batch):
        state = jax.eval_shape(create_state)
        images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.uint8)
        return jax.jit(step, donate_argnums=0).lower(state, images)

    with ThreadPoolExecutor() as pool:
        started = [pool.submit(lambda: create_state.lower().compile())]
        started += [pool.submit(compile_step, batch, lower(batch)) for batch in spec["batches"]]
    errors = [str(future.exception())[:300] for future in started if future.exception()]

    def ceiling(request):
        n = request["size"]
        a, b = (jax.random.normal(jax.random.PRNGKey(i), (n, n), jnp.bfloat16) for i in (0, 1))
        product = jax.jit(jnp.matmul)
        found = time_groups(lambda: product(a, b), lambda x: float(x[0, 0]), request)
        return {"flops_per_sec": 2 * n**3 / float(np.median(found["sec"]))}

    def start(batch):
        if batch not in programs:  # it failed, maybe because others took the memory
            compile_step(batch, lower(batch))
        compiled, found = programs[batch]
        state = create_state()
        images = np.random.default_rng(1).integers(0, 256, (batch, 32, 32, 3), np.uint8)
        images = jax.device_put(images)

        def next_step():
            nonlocal state
            state, outputs = compiled(state, images)
            return state, outputs

        def wait(out):
            return float(jax.block_until_ready(out)[1].scalars["loss"])

        return next_step, wait, found

    def case(request):
        next_step, wait, found = start(request["batch"])
        timed = time_groups(next_step, wait, request)
        return timed | found | {"peak_memory_bytes": peak_memory_bytes(jax.devices()[0])}

    def profile(request):
        next_step, wait, _ = start(request["batch"])
        for _ in range(3):
            wait(next_step())
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                started = time.perf_counter()
                for _ in range(5):
                    out = next_step()
                wait(out)
                wall = time.perf_counter() - started
            path = next(pathlib.Path(folder).rglob("*.xplane.pb"))
            planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
            return kernels(planes) | {"wall_sec": wall, "num_steps": 5}

    hardware = jax.devices()[0].device_kind
    requests = {"ceiling": ceiling, "case": case, "profile": profile}
    return {"hardware": hardware, "errors": errors}, lambda r: requests[r["do"]](r)


def kernels(planes) -> dict:
    """Number and seconds of the device's kernels by name, without the number that ends it."""
    lines = [
        line for plane in planes if plane.name.startswith("/device:GPU:0")
        for line in plane.lines if line.name.startswith("Stream")
    ]  # fmt: skip
    events = [event for line in lines for event in line.events]
    if not events:
        seen = {plane.name: [line.name for line in plane.lines][:8] for plane in planes}
        return {"error": f"no kernels in the trace, but {seen}"[:600]}
    found = {}
    for event in events:
        entry = found.setdefault(re.sub(r"([._]\d+)+$", "", event.name), [0, 0.0])
        entry[0] += 1
        entry[1] += event.duration_ns / 1e9
    first = min(event.start_ns for event in events)
    last = max(event.start_ns + event.duration_ns for event in events)
    top = sorted(found.items(), key=lambda item: -item[1][1])[:10]
    total = sum(sec for _, sec in found.values())
    return {"top": top, "all_kernels_sec": total, "device_span_sec": (last - first) / 1e9}


def prepare_torch(spec):
    """Runs two compiled steps of PyTorch; returns no facts, and a function for requests."""
    import torch
    import torch_baseline

    model, on_gpu, errors = MODELS[spec["model"]], torch.cuda.is_available(), []
    c = torch_baseline.CONFIGS[model.config] | torch_baseline.MODELS.get(model.size, {})
    if model.predictor:
        c |= dict(zip(("pred_width", "pred_heads"), model.predictor, strict=True))
    steps = {
        name: torch_baseline.make_step(
            c, spec["batches"][0], mode="bfloat16", compiled=name == "compiled"
        )
        for name in ("eager", "compiled")
    }
    started = time.perf_counter()
    for attempt in range(5):
        try:
            for _ in range(2):
                steps["compiled"]().item()
            break
        except torch.OutOfMemoryError as error:  # others warm up beside this process
            errors.append(f"attempt {attempt}: {error}"[:100])
        free(torch)
        time.sleep(3)
    compile_sec = round(time.perf_counter() - started, 1)
    free(torch)

    def answer(request):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        step, ahead = steps[request["name"]], request["masks"] == "ahead"
        try:
            found = time_groups(lambda: step(ahead), lambda loss: loss.item(), request)
        finally:
            memory = torch.cuda.max_memory_allocated() if on_gpu else None
            free(torch)
        found |= {"compile_sec": compile_sec} if request["name"] == "compiled" else {}
        return found | {"peak_memory_bytes": memory}

    return {"errors": errors}, answer


def free(torch) -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def serve(spec) -> None:
    """A child: one line of JSON when ready, then one for each on stdin."""

    def attempt(function, *args):
        try:
            return function(*args)
        except Exception as error:
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}

    prepare = {"ours": prepare_ours, "torch": prepare_torch}[spec["who"]]
    ready = attempt(prepare, spec)
    about, answer = ready if isinstance(ready, tuple) else (ready, lambda _: ready)
    print(f"\n{MARK}{json.dumps(about)}", flush=True)
    for line in sys.stdin:
        print(f"\n{MARK}{json.dumps(attempt(answer, json.loads(line)))}", flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
