"""How the process holds the memory of the CPU's arrays: from step to step, and in large pages."""

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
    """Tells glibc to keep freed memory, and Linux to back it with huge pages; elsewhere nothing.

    XLA on CPU allocates the temporaries of a step anew at each call. Returned to the system and
    handed out again they cost a page fault per 4 KiB: a million in a step of `cifar10_tiny`.

    To be called before NumPy or JAX is imported. Threads that are there by then have an arena of
    their own, which large blocks do not fit into, and other threads come to share it.
    """
    libc = _glibc()
    if libc is None:
        return
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        libc.mallopt(option, value)
    _keeping.set()
    _ask_for_huge_pages(libc, machine_bytes() // 2)


def stop_keeping_memory() -> None:
    """Undoes `keep_freed_memory`: for a backend whose arrays are not in the machine's memory."""
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
    """Gives back free memory if it is kept, and the process holds over a share `above` of all.

    What was allocated beside the temporaries of a step can keep the next ones from their place:
    without this a process would come to hold them two or three times over.
    """
    if not _keeping.is_set():  # also where there is no /proc to read
        return
    libc = _glibc()
    if libc is not None and resident_bytes() > above * machine_bytes():
        libc.malloc_trim(0)


def resident_bytes() -> int:
    """Memory that the process holds, on Linux."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * mmap.PAGESIZE


@functools.cache
def machine_bytes() -> int:
    """Memory of the machine, or of the container where that has less."""
    physical = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    try:
        return min(physical, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return physical


def available_bytes() -> int:
    """Returns the memory that the process can still have; outside Linux, all of the machine."""
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
    # The cache of files counts as used, and is given up where memory is needed.
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
    """Marks the next `num_bytes` of the heap; they are addresses only until somebody writes."""
    block = libc.malloc(num_bytes)
    if block is None:  # a limit on addresses (ulimit -v): small pages then
        return
    start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(start, num_bytes - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    libc.free(block)  # to the heap, as its trimming is off by now
