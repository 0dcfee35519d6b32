"""A process keeps its freed memory, and returns it on request."""

import subprocess
import sys

import pytest

# Prints the page faults of four calls of a program with 64 MB of temporaries. Two calls before
# warm it up.
FAULTS = """
import resource
from hjepa_jax.runtime.host_memory import keep_freed_memory
{keep}
import jax, jax.numpy as jnp

def f(x):
    y = jnp.sin(x[:, None] + x[None])  # [4096, 4096]: materialised, because it is used twice
    return jnp.sum(jax.lax.optimization_barrier(y), axis=0) @ y

f, x = jax.jit(f), jnp.ones(4096)
for _ in range(2):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# Prints how much of 256 MiB the process still holds after it freed them. The three measurements are
# at once, with spare memory, and with too little memory.
RETURNED = """
from hjepa_jax.runtime import host_memory
host_memory.keep_freed_memory()
import numpy as np

before, block = host_memory.resident_bytes(), np.ones(1 << 25)
small = [bytearray(2000) for _ in range(100)]  # above it, so that the heap cannot shrink
del block
print(host_memory.resident_bytes() - before)
host_memory.return_unused_memory(above=1.0)
print(host_memory.resident_bytes() - before)
host_memory.return_unused_memory(above=before / host_memory.machine_bytes())
print(host_memory.resident_bytes() - before)

host_memory.stop_keeping_memory()
trimmed = []
host_memory.resident_bytes = lambda: trimmed.append(1) or 2**60  # as on a full machine
host_memory.return_unused_memory()
print(len(trimmed))
"""

on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux: host_memory does nothing elsewhere"
)


def printed(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
@on_linux
def test_memory_freed_by_a_step_is_reused_by_the_next():
    (dropped,), (kept,) = (
        printed(FAULTS.format(keep=keep)) for keep in ("", "keep_freed_memory()")
    )
    assert dropped > 10_000  # 64 MB are 16,000 pages of 4 KiB
    assert kept < 1_000


@on_linux
def test_free_memory_is_returned_if_the_machine_has_little():
    """After `stop_keeping_memory`, no step reads /proc or trims the heap."""
    freed, roomy, scarce, num_reads = printed(RETURNED)
    assert num_reads == 0
    assert min(freed, roomy) > 200 << 20
    assert scarce < 50 << 20
