"""Keeps freed memory in the process between steps, in huge pages (Linux, CPU)."""

import ctypes
import functools
import mmap
import os
import pathlib
import sys
import threading

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_keeping = threading.Event()  # set while this process keeps freed memory


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory and Linux use huge pages for it; does nothing elsewhere.

    XLA on CPU allocates new temporaries in each step. If glibc returns freed memory to the system,
    every step has one page fault per 4 KiB: a million in a step of ViT-Tiny with eight views of 128
    images. Call this function before NumPy or JAX is imported, because existing threads have
    separate arenas that are too small for large blocks.
    """
    libc = _glibc()
    if libc is None:
        return
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        libc.mallopt(option, value)
    _keeping.set()
    _ask_for_huge_pages(libc, machine_bytes() // 2)


def stop_keeping_memory() -> None:
    """Undoes `keep_freed_memory`, for a backend with its own memory."""
    libc = _glibc()
    if libc is None or not _keeping.is_set():
        return
    _keeping.clear()
    for option, value in (
        (_M_ARENA_MAX, 0),  # glibc's own limit
        (_M_MMAP_MAX, 65536),
        (_M_TRIM_THRESHOLD, 128 * 1024),
    ):
        libc.mallopt(option, value)
    libc.malloc_trim(0)


def return_unused_memory(*, above: float = 0.0) -> None:
    """Returns kept memory to the system if the process holds more than a share of the machine.

    Other allocations fragment the kept memory, so that the temporaries of the next step no longer
    fit. Without this function a process would hold them two or three times.

    Args:
      above: share of the machine's memory, in [0, 1].
    """
    if not _keeping.is_set():  # always so on systems without /proc
        return
    libc = _glibc()
    if libc is not None and resident_bytes() > above * machine_bytes():
        libc.malloc_trim(0)


def resident_bytes() -> int:
    """Returns the memory that the process holds, on Linux."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * mmap.PAGESIZE


@functools.cache
def machine_bytes() -> int:
    """Returns the memory of the machine, or of its container if that is smaller."""
    physical = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    try:
        return min(physical, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return physical


def available_bytes() -> int:
    """Returns the memory that is still available; outside Linux, all of the machine."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return machine_bytes()
    available, group = int(kib) * 1024, pathlib.Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{x}").read_text()) for x in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or "max"
        return available
    # The file cache counts as used, but the system frees it on demand.
    return min(available, limit - used + int(stat.get("file", 0)))


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another C library
        return None
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc


def _ask_for_huge_pages(libc: ctypes.CDLL, num_bytes: int) -> None:
    """Requests huge pages for the next `num_bytes` of the heap. Unwritten pages use no memory."""
    block = libc.malloc(num_bytes)
    if block is None:  # a limit on addresses (ulimit -v): keep small pages
        return
    start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(start, num_bytes - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    libc.free(block)  # it stays in the heap, because trimming is off
