"""The processes of one run, on one machine or on many: how they join, agree and leave.

    with member("10.0.0.1:1234", num_processes=2, process_id=0):
        with first_process_first():     # files on a shared disk are made once
            data = load()
        signum = largest(signum)        # the same number in all processes

JAX connects the processes and computes across them. But if one process is killed or fails, the
others wait in a computation that never ends, or JAX ends them with a long traceback. So each
process reports every second that it is alive. A thread (`_watch`) ends this process with one line
if another process is silent or has failed. In a single process all of this does nothing.
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
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree, Shaped

from hjepa_jax.errors import InputError, Interrupted, first_line

MIN_JAX = (0, 7, 1)  # the first version with a setting for heartbeats
CONNECT_SEC = 300  # seconds in which all processes must join
# Seconds after which a silent process is lost. JAX's limit is longer, because it is needed only if
# the thread `_watch` hangs; JAX may report after half of its limit.
SILENT_SEC, JAX_SILENT_SEC = 30, 90
PARTING_SEC = 15  # seconds that the other processes have to exit after one has stopped
PROCESS_0_LOST = "process 0 does not answer any more"
LOST = 3  # exit status when another process is lost
MEETING_SEC = 24 * 3600  # longest wait in `meet`, seconds

_stopped = threading.Event()
_meetings = itertools.count()


def is_first() -> bool:
    """Returns whether this is process 0, the one that writes files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def member(
    coordinator: str | None, *, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Makes this process one of several that train together, inside the context.

    Args:
      coordinator: host and port on which process 0 listens, the same for all. "auto": SLURM, Open
        MPI or Kubernetes provides all three arguments. None: a single process.
      num_processes: number of processes.
      process_id: number of this process, from 0.

    Raises:
      InputError: if they cannot connect, or there are several without a coordinator
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
            print(f"error: {first_line(error)}; ending all processes", file=sys.stderr, flush=True)
        if not leave(" ".join(str(error).split()) or type(error).__name__):
            # At exit JAX would wait for the others once more, and crash.
            atexit.register(_exit, _status(error))
        raise
    leave()


def _join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    if jax.__version_info__ < MIN_JAX:
        rule = f"needs jax {'.'.join(map(str, MIN_JAX))} or newer, not {jax.__version__}"
        raise InputError("--coordinator", coordinator, rule)
    address = None if coordinator == "auto" else coordinator
    if address is not None and not address.rpartition(":")[2].isdecimal():
        rule = "must be auto, or host and port as in 10.0.0.1:1234"
        raise InputError("--coordinator", coordinator, rule)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's preemption service would take SIGTERM, which the loop handles.
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
        rule = "the processes do not find each other"
        if address is None:
            rule = "no SLURM, Open MPI or Kubernetes says where the others are"
        rule += f" ({first_line(error)})"
        raise InputError("--coordinator", coordinator, rule) from error
    if _state().process_id != 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # only process 0 prints
    _stopped.clear()
    threading.Thread(target=_watch, args=(_state().client,), daemon=True).start()


def leave(reason: str = "") -> bool:
    """Leaves the group of processes and returns whether all have left.

    Waits for the others, because they mostly end at the same step. A process that does not end
    reads the reason that this process has recorded, and then ends too.

    Args:
      reason: why this process leaves, in one line; "" if the work is done. In that case it waits
        longer for the others.
    """
    if _stopped.is_set() or _state().client is None:
        return _state().client is None
    client, state = _state().client, _state()
    try:
        client.key_value_set(f"left/{state.process_id}", reason, allow_overwrite=True)
        # Process 0 holds the records, so it must outlive the processes that read its reason.
        until = time.monotonic() + (2 * PARTING_SEC if reason else 20 * PARTING_SEC)
        while time.monotonic() < until:
            if len(client.key_value_dir_get("left/")) == state.num_processes:
                _stopped.set()
                jax.distributed.shutdown()
                return True
            time.sleep(0.05)
    except RuntimeError:  # process 0 and its records are gone
        if reason:  # mostly a consequence of the loss of process 0
            _end(f"{PROCESS_0_LOST} ({reason})")
    _stopped.set()
    return False


def _wait_while_others_are_silent() -> None:
    """Waits until it is clear that an error of JAX comes from this process.

    If another process is gone, JAX reports only a broken connection, and `_watch` ends this process
    with a better message. If all others show a new sign of life, which takes a second, the error
    comes from this process.
    """
    client, state = _state().client, _state()
    before: dict[str, str] = {}
    until = time.monotonic() + SILENT_SEC + 5
    while time.monotonic() < until:
        try:
            alive, left = _records(client, "alive/"), _records(client, "left/")
        except RuntimeError:  # process 0 is gone; `_watch` sees the same
            alive, left = {}, {}
        before = before or alive
        new = {process for process, sign in alive.items() if sign != before.get(process)}
        new |= {process for process, reason in left.items() if not reason} | {str(state.process_id)}
        if not any(left.values()) and len(new) == state.num_processes:
            return
        time.sleep(0.1)


def _records(client: Any, folder: str) -> dict[str, str]:
    """Returns the record of each process in `folder`, by the number of the process."""
    return {k.rpartition("/")[2]: v for k, v in client.key_value_dir_get(folder)}


def _status(error: BaseException) -> int:
    """Returns the command's exit status after `error`."""
    if isinstance(error, (InputError, Interrupted)):
        return error.status
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch(client: Any) -> None:
    """Ends this process if another one is lost."""
    state = _state()
    heard: dict[str, tuple[str, float]] = {}  # process -> its newest sign of life, and the time
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
            own = process == str(state.process_id)
            if reason and not own and now - left_at.setdefault(process, now) > PARTING_SEC:
                _end(f"process {process} of {state.num_processes} has ended ({reason})")
        if _stopped.wait(1.0):
            return


def _end(what: str) -> None:
    if _stopped.is_set():
        return
    advice = "the same command, with as many processes or fewer, goes on from the newest checkpoint"
    print(f"error: {what}; {advice}", file=sys.stderr, flush=True)
    os._exit(LOST)  # the main thread may be in a computation that never ends


def meet() -> None:
    """Waits until all processes are here; `_watch` handles processes that die.

    On CPU, the first computation across processes fails if one comes more than 30 seconds late.
    """
    if jax.process_count() > 1:
        _state().client.wait_at_barrier(f"meeting {next(_meetings)}", 1000 * MEETING_SEC)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Runs the block in process 0 first, then in the others: process 0 creates shared files."""
    if not is_first():
        meet()
    yield
    if is_first():
        meet()


def by_first(action: Callable[[], None]) -> None:
    """Runs `action` in process 0; the others wait for it.

    Raises:
      InputError: the error of `action` in process 0; in the others, one that refers to it.
    """
    failures = []
    if is_first():
        try:
            action()
        except InputError as error:
            failures.append(error)
    if largest(len(failures)):
        rule = "is refused by process 0, whose line says why"
        raise failures[0] if failures else InputError("--workdir", "", rule)


def largest(value: int) -> int:
    """Returns the largest value of all processes; all must call this."""
    return int(all_rows(np.array([value], np.int32)).max())


def total(value: int) -> int:
    """Returns the sum of the values of the processes; all must call this."""
    return int(all_rows(np.array([value], np.int32)).sum())


def all_rows(rows: PyTree[Shaped[np.ndarray, "n ..."]]) -> PyTree[Shaped[np.ndarray, "m ..."]]:
    """Returns the rows of all processes in their order; each has the same number of rows."""
    if jax.process_count() == 1:
        return rows
    meet()
    return multihost_utils.process_allgather(rows, tiled=True)


def divided(
    fn: Callable[[Shaped[np.ndarray, " k"]], PyTree[Shaped[np.ndarray, "k ..."]]],
    items: Shaped[np.ndarray, " n"],
) -> PyTree[Shaped[np.ndarray, "n ..."]]:
    """Returns `fn(items)`; each process computes a part, so each row may use its own item only."""
    share = -(-len(items) // jax.process_count())
    padded = np.resize(items, share * jax.process_count())
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    return jax.tree.map(lambda rows: rows[: len(items)], all_rows(fn(padded[own])))


def check_same(field: str, value: Any, checksum: int) -> None:
    """Raises an InputError in all processes if their checksums (below 2^31) differ."""
    if largest(checksum) != -largest(-checksum):
        raise InputError(field, value, "must be the same in all processes of a run")


def _state() -> Any:
    """Returns JAX's record of the processes. There is no public API; Orbax uses the same."""
    from jax._src import distributed

    return distributed.global_state
