"""The processes of one run, on one machine or on many: joining, agreeing, parting.

    with member("10.0.0.1:1234", num_processes=2, process_id=0):
        with first_process_first():     # what lies on a shared disk is made once
            data = load()
        signum = largest(signum)        # the same number in all processes

JAX connects the processes and computes across them. What it lacks is the last word: a process that
is killed or gives up leaves the others waiting in a computation that cannot end, or ends them
within a page of its own trace. So each process says every second that it is alive, and a thread
beside the training (`_watch`) ends this one, with one line, when another is silent or has given up.
In a single process all of this does nothing.
"""

import atexit
import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree, Shaped

from hjepa_jax.errors import InputError, Interrupted

# The first whose heartbeats can be set.
MIN_JAX = (0, 7, 1)
CONNECT_SEC = 300  # for all processes to come, the slowest included
# A process that is silent for so long is lost. JAX's own verdict, should the thread hang, is later:
# its heartbeats are half of its limit apart, so that it comes after half of it at the earliest.
SILENT_SEC, JAX_SILENT_SEC = 30, 90
# So long others have to find the end by themselves that one of them has found.
PARTING_SEC = 15
PROCESS_0_LOST = "process 0 does not answer any more"
LOST = 3  # exit status when another process is lost

MEETING_SEC = 24 * 3600

_stopped = threading.Event()
_meetings = itertools.count()


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def member(
    coordinator: str | None, *, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Within the context this process is one of several that train together.

    Args:
      coordinator: host and port on which process 0 listens, the same for all; "auto" where SLURM,
        Open MPI or Kubernetes knows it (and the next two); None: a process by itself.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      InputError: when they do not find each other, or are several without a coordinator
        ("--coordinator").
    """
    if coordinator is None:
        if (num_processes or 1) > 1 or process_id:
            rule = "must be given with --num_processes and --process_id"
            raise InputError("--coordinator", coordinator, rule)
        yield
        return
    _join(coordinator, num_processes, process_id)
    try:
        yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            _wait_while_others_are_silent()
            first_line = str(error).partition("\n")[0]
            print(f"error: {first_line}; ending all processes", file=sys.stderr, flush=True)
        if not leave(" ".join(str(error).split()) or type(error).__name__):
            # At its exit JAX would wait for the others once more, and die of it.
            atexit.register(_exit, _status(error))
        raise
    leave()


def _join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    def refuse(rule: str) -> NoReturn:
        raise InputError("--coordinator", coordinator, rule)

    if jax.__version_info__ < MIN_JAX:
        refuse(f"needs jax {'.'.join(map(str, MIN_JAX))} or newer, not {jax.__version__}")
    address = None if coordinator == "auto" else coordinator
    if address is not None and not address.rpartition(":")[2].isdecimal():
        refuse("must be auto, or host and port as in 10.0.0.1:1234")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM, on which the loop saves.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=CONNECT_SEC,
            heartbeat_timeout_seconds=JAX_SILENT_SEC,
            shutdown_timeout_seconds=PARTING_SEC,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        what = "the processes do not find each other"
        if address is None:
            what = "no SLURM, Open MPI or Kubernetes says where the others are"
        refuse(f"{what} ({str(error).splitlines()[0]})")
    if _state().process_id != 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the first process speaks for all
    _stopped.clear()
    threading.Thread(target=_watch, args=(_state().client,), daemon=True).start()


def leave(reason: str = "") -> bool:
    """Parts from the other processes; from here on this one is by itself.

    Waits a little for the others, which mostly come to the same end at the same step. Those that do
    not are ended by what this one leaves behind: its reason.

    Args:
      reason: why, in one line; empty when the work is done, on which the others may take longer.

    Returns:
      Whether all have left.
    """
    if _stopped.is_set() or _state().client is None:
        return _state().client is None
    client, state = _state().client, _state()
    try:
        client.key_value_set(f"left/{state.process_id}", reason, allow_overwrite=True)
        # Process 0 holds the records: those that read its reason there must be gone before it is.
        until = time.monotonic() + (2 * PARTING_SEC if reason else 20 * PARTING_SEC)
        while time.monotonic() < until:
            if len(client.key_value_dir_get("left/")) == state.num_processes:
                _stopped.set()
                jax.distributed.shutdown()
                return True
            time.sleep(0.05)
    except RuntimeError:  # process 0, which keeps the records, is gone
        if reason:
            _end(f"{PROCESS_0_LOST} ({reason})")  # which mostly follows from it
    _stopped.set()
    return False


def _wait_while_others_are_silent() -> None:
    """Finds out whether JAX's error is this process's own; returns as soon as it is.

    If another process is gone, JAX reports the broken connection, which says little. Then this
    waits until `_watch` ends this process with a better line. If every other process shows a new
    sign of life, which takes a second, the error did not come from one of them.
    """
    client, state = _state().client, _state()
    before: dict[str, str] = {}
    until = time.monotonic() + SILENT_SEC + 5
    while time.monotonic() < until:
        try:
            alive, left = _records(client, "alive/"), _records(client, "left/")
        except RuntimeError:  # process 0 is gone: `_watch` finds the same
            alive, left = {}, {}
        before = before or alive
        new = {process for process, sign in alive.items() if sign != before.get(process)}
        new |= {process for process, reason in left.items() if not reason} | {str(state.process_id)}
        if not any(left.values()) and len(new) == state.num_processes:
            return
        time.sleep(0.1)


def _records(client: Any, folder: str) -> dict[str, str]:
    """Process -> what it has written into `folder`."""
    return {k.rpartition("/")[2]: v for k, v in client.key_value_dir_get(folder)}


def _status(error: BaseException) -> int:
    """The command's exit status after `error`."""
    if isinstance(error, (InputError, Interrupted)):
        return error.status
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch(client: Any) -> None:
    """Ends this process when another is lost."""
    state = _state()
    heard: dict[str, tuple[str, float]] = {}  # process -> its newest sign of life, and when
    left_at: dict[str, float] = {}
    for beat in range(sys.maxsize):
        try:
            client.key_value_set(f"alive/{state.process_id}", str(beat), allow_overwrite=True)
            alive, left = _records(client, "alive/"), _records(client, "left/")
        except RuntimeError:
            if not _stopped.is_set():
                _end(PROCESS_0_LOST)
            return
        now = time.monotonic()
        for process, sign in alive.items():
            if heard.get(process, ("", 0.0))[0] != sign:
                heard[process] = (sign, now)
            elif now - heard[process][1] > SILENT_SEC and process not in left:
                _end(f"process {process} of {state.num_processes} is silent for {SILENT_SEC} s")
        for process, reason in left.items():
            own = process == str(state.process_id)  # which waits for the others to read its reason
            if reason and not own and now - left_at.setdefault(process, now) > PARTING_SEC:
                _end(f"process {process} of {state.num_processes} has ended ({reason})")
        if _stopped.wait(1.0):
            return


def _end(what: str) -> None:
    if _stopped.is_set():
        return
    print(
        f"error: {what}; the same command, with as many processes or fewer, goes on from the "
        "newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)  # the main thread may be in a computation that never ends


def meet() -> None:
    """Waits until all processes are here, however long it takes (`_watch` sees to those that die).

    On CPU, processes that compute together for the first time must come within 30 seconds.
    """
    if jax.process_count() > 1:
        _state().client.wait_at_barrier(f"meeting {next(_meetings)}", 1000 * MEETING_SEC)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block by itself, then the others do: it may make shared files."""
    if not is_first():
        meet()
    yield
    if is_first():
        meet()


def by_first(action: Callable[[], None]) -> None:
    """The first process does `action`, the others wait for it.

    Raises:
      InputError: what `action` raised; in the others, that it did.
    """
    failure = None
    if is_first():
        try:
            action()
        except InputError as error:
            failure = error
    failed = bool(largest(failure is not None))
    if failure:
        raise failure
    if failed:
        raise InputError("--workdir", "", "is refused by process 0, whose line says why")


def largest(value: int) -> int:
    """The largest of the processes' values, in each of them; all must ask."""
    return int(all_rows(np.array([value], np.int32)).max())


def total(value: int) -> int:
    """The sum of the processes' values, in each of them; all must ask."""
    return int(all_rows(np.array([value], np.int32)).sum())


def all_rows(rows: PyTree[Shaped[np.ndarray, "n ..."]]) -> PyTree[Shaped[np.ndarray, "m ..."]]:
    """The rows of all processes, each of which has as many, one process after the other.

    Of a dict of arrays, the same dict.
    """
    if jax.process_count() == 1:
        return rows
    meet()
    return multihost_utils.process_allgather(rows, tiled=True)


def divided(
    fn: Callable[[Shaped[np.ndarray, " k"]], PyTree[Shaped[np.ndarray, "k ..."]]],
    items: Shaped[np.ndarray, " n"],
) -> PyTree[Shaped[np.ndarray, "n ..."]]:
    """`fn(items)`, of which each process computes a part; `fn` takes each item by itself."""
    share = -(-len(items) // jax.process_count())
    padded = np.resize(items, share * jax.process_count())
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    return jax.tree.map(lambda rows: rows[: len(items)], all_rows(fn(padded[own])))


def check_same(field: str, value: Any, checksum: int) -> None:
    """Refuses what differs between processes.

    Args:
      field: name of what must be the same.
      value: what it is here.
      checksum: of it, below 2^31.

    Raises:
      InputError: in all processes alike.
    """
    if largest(checksum) != -largest(-checksum):
        raise InputError(field, value, "must be the same in all processes of a run")


def _state() -> Any:
    """JAX's record of the processes. Orbax, too, reaches for it: there is no public way."""
    from jax._src import distributed

    return distributed.global_state
