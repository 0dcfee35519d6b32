"""The memory of a process: kept when freed, whichever thread of XLA frees it."""

import subprocess
import sys

import pytest

# Prints the page faults of ten calls of a program with 64 MB of temporaries, after two others.
FAULTS = """
import resource
from hjepa_jax.host_memory import keep_freed_memory
{keep}
import jax, jax.numpy as jnp

def f(x):
    y = jnp.sin(x[:, None] + x[None])  # [4096, 4096]: as it is used twice, it is there in full
    return jnp.sum(jax.lax.optimization_barrier(y), axis=0) @ y

f, x = jax.jit(f), jnp.ones(4096)
for _ in range(2):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, as its subject does")
def test_memory_that_a_step_freed_is_there_for_the_next_one():
    def faults(keep):
        code = FAULTS.format(keep=keep)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("") > 10_000  # 64 MB are 16,000 pages of 4 KiB
    assert faults("keep_freed_memory()") < 1_000
