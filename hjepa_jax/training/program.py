"""Compiles the training step, and prints the progress."""

import time

from hjepa_jax.runs.limits import step_bytes, warn_of_sizes
from hjepa_jax.runs.run import Program, Run
from hjepa_jax.runtime import cluster
from hjepa_jax.runtime.backend import current_rules
from hjepa_jax.runtime.host_memory import return_unused_memory, stop_keeping_memory


def compile_step(run: Run, backend: str, *, step: int) -> Program:
    """Returns the compiled program of a run that starts or resumes at `step`."""
    rules = current_rules()
    if cluster.is_first():
        print("compiling the training step ...", flush=True)
    started = time.perf_counter()
    program = run.compile()
    if cluster.is_first():
        warn_of_sizes(run.config, step_bytes(program.run_steps))
    if backend != "cpu":
        stop_keeping_memory()
    return_unused_memory()
    print(
        f"compiled in {time.perf_counter() - started:.1f} s on {backend}"
        + (f" ({rules})" if str(rules) else "")
        + (f", going on at step {step}" if step else ", starting"),
        flush=True,
    )
    return program
