"""Batches of a training set that does not fit into memory, decoded ahead by worker processes.

`BatchOrder` gives the order, a function of (seed, step). So there is no state to save: a resumed
run continues with the very next batch. The content of a batch does not depend on the number of
workers or processes. An unreadable record is counted, and the next readable one replaces it.
"""

import gc
import multiprocessing
import os
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Int32, Num

from hjepa_jax.data.order import BatchOrder
from hjepa_jax.data.records import Records, read_or_next
from hjepa_jax.errors import InputError, first_line

WORKER_BUFFER = 2  # decoded batches per worker
DEVICE_BUFFER = 2  # batches on the device


class _Batches:
    """Batches of steps `first_step` ... `num_steps - 1`, as a data source of grain."""

    def __init__(
        self,
        records: Records,
        order: BatchOrder,
        first_step: int,
        num_steps: int,
        num_parts: int,
        shard: slice,
    ):
        self._records, self._order = records, order
        self._num_parts, self._shard = num_parts, shard
        self._first_step, self._num_steps = first_step, num_steps

    def __len__(self) -> int:
        return self._num_steps - self._first_step

    def __getitem__(self, i: int) -> tuple[Num[np.ndarray, "b H W C"], Int32[np.ndarray, " _"]]:
        """Returns the images of a batch, and its unreadable rows."""
        (rows,) = self._order.batches(self._first_step + i, 1, size=1)
        rows = rows.reshape(self._num_parts, -1)[:, self._shard].reshape(-1)
        images, unreadable = [], []
        for row in rows.tolist():
            image, is_own = read_or_next(self._records, row)
            images.append(image)
            if not is_own:
                unreadable.append(row)
        return np.stack(images), np.array(unreadable, np.int32)


def _start_worker(index: int, count: int) -> None:
    """Ignores signals, which the run handles; ends the worker when the run ends or is killed."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # batch systems and terminals signal all processes
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    warnings.simplefilter("ignore")  # about metadata, which does not matter
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def read_batches(
    records: Records,
    order: BatchOrder,
    first_step: int,
    num_steps: int,
    *,
    num_workers: int,
    num_parts: int = 1,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[tuple[Num[np.ndarray, "b H W C"], Int32[np.ndarray, " _"]]]:
    """Yields the images and the unreadable rows of steps `first_step` ... `num_steps - 1`.

    Args:
      records: the training set.
      order: rows of each batch.
      first_step: the first step.
      num_steps: the step after the last.
      num_workers: worker processes; 0 = one thread of this process.
      num_parts: parts of each batch (gradient accumulation).
      shard_index: shard of this process. A shard is a contiguous piece of each part; the images of
        all parts are returned one after the other.
      shard_count: number of processes that share a batch; it divides the size of a part.

    Raises:
      InputError: too many consecutive records are unreadable, or a worker has died.
    """
    if not flags.FLAGS.is_parsed():  # grain reads the defaults of its flags
        flags.FLAGS.mark_as_parsed()
    size = order.batch_size // (num_parts * shard_count)
    shard = slice(shard_index * size, (shard_index + 1) * size)
    batches: Any = _Batches(records, order, first_step, num_steps, num_parts, shard)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=WORKER_BUFFER)
    )
    options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=1)
    iterator: Any = iter(dataset.mp_prefetch(options, worker_init_fn=_start_worker))
    try:
        for images, unreadable in iterator:
            # Copies out of shared memory.
            yield (
                np.array(images),
                np.array(unreadable),
            )
    except RuntimeError as error:  # from grain: a worker was killed or ran out of memory
        rule = f"a process that reads the training images is gone: {first_line(error)}"
        raise InputError("data.num_workers", num_workers, rule) from error
    finally:
        iterator.close()


class StreamedBatches:
    """Batches that a thread copies to the device ahead of the step; see `read_batches`.

    Args:
      batches: result of `read_batches`.
      size: S, batches per call of the training program; fewer are padded.
      put: copies uint8 [1, b, H, W, C] to the device.

    Attributes:
      unreadable: unreadable rows of all batches so far.
    """

    def __init__(self, batches: Iterator[Any], *, size: int, put: Callable[..., Any]):
        self._size, self.unreadable = size, set[int]()
        self._queue: queue.Queue[Any] = queue.Queue(DEVICE_BUFFER)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._bring, args=(batches, put), daemon=True)
        self._thread.start()

    def take(self, step: int, count: int) -> tuple[Any, None]:
        """Returns the batches of the next `count` steps, uint8 [S, B, H, W, C], and no index.

        Args:
          step: first of these steps; follows the last step of the call before.
          count: number of steps, at most S.

        Raises:
          InputError: see `read_batches`.
        """
        parts = []
        for _ in range(count):
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            images, unreadable = item
            parts.append(images)
            self.unreadable.update(unreadable.tolist())
        parts += parts[-1:] * (self._size - count)
        return parts[0] if self._size == 1 else jnp.concatenate(parts), None

    def close(self) -> None:
        """Ends the thread and the workers, and drops their batches."""
        self._closed.set()
        self._thread.join(timeout=30)  # a daemon: a disk that hangs does not block the run

    def _bring(self, batches: Any, put: Callable[..., Any]) -> None:
        try:
            for images, unreadable in batches:
                if not self._offer((put(images[None]), unreadable)):
                    return
        except Exception as error:  # raised by `take`
            self._offer(error)
        finally:
            batches.close()
            gc.collect()  # reference cycles in grain hold memory that is shared with workers

    def _offer(self, item: Any) -> bool:
        """Puts an item into the queue; returns False if the queue is closed."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
