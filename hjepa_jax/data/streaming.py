"""Batches of a training set that does not fit: decoded by worker processes, ahead of the step.

The order is `BatchOrder`'s, a function of (seed, step): no state is kept or restored, a resumed run
goes on with the very next batch, and neither the number of workers nor that of the processes that
share a batch changes what is in it. A record that cannot be read gives place to the next one of the
set that can, and is counted.
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
from jaxtyping import Int32, UInt8

from hjepa_jax.data.order import BatchOrder
from hjepa_jax.data.records import Records, read_or_next
from hjepa_jax.errors import InputError, first_line

WORKER_BUFFER = 2  # decoded batches that wait in each worker
DEVICE_BUFFER = 2  # batches that wait on the device


class _Batches:
    """The batches of steps `first_step` ... `num_steps - 1`, as grain takes them."""

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

    def __getitem__(self, i: int) -> tuple[UInt8[np.ndarray, "b H W C"], Int32[np.ndarray, " _"]]:
        """Decodes a batch; with it, the rows that could not be read."""
        (rows,) = self._order.batches(self._first_step + i, 1, size=1)
        rows = rows.reshape(self._num_parts, -1)[:, self._shard].reshape(-1)
        images = np.empty((len(rows), *self._records.image_shape), np.uint8)
        unreadable = []
        for image, row in zip(images, rows.tolist(), strict=True):
            image[:], is_own = read_or_next(self._records, row)
            if not is_own:
                unreadable.append(row)
        return images, np.array(unreadable, np.int32)


def _start_worker(index: int, count: int) -> None:
    """Signals are the run's to handle, and a worker ends with it, even if that is killed."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # a batch system sends it to all processes
        signal.signal(signum, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # odd metadata: what matters is whether there is a picture
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
) -> Iterator[tuple[UInt8[np.ndarray, "b H W C"], Int32[np.ndarray, " _"]]]:
    """Batches of steps `first_step` ... `num_steps - 1`, in order, and rows that were unreadable.

    Args:
      records: the training set.
      order: which rows make up each batch.
      first_step: the first step.
      num_steps: the step after the last.
      num_workers: processes that decode; 0: one thread of this process.
      num_parts: parts of each batch (gradient accumulation), all of which are shared.
      shard_index: which contiguous shard of each part is wanted, of `shard_count`; the batch that
        is returned has the shards of all parts, one after the other.
      shard_count: how many processes share a batch; it divides the size of a part.

    Raises:
      InputError: too many records in a row cannot be read, or a worker is gone.
    """
    if not flags.FLAGS.is_parsed():  # grain has flags, whose defaults it wants to read
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
            yield np.array(images), np.array(unreadable)  # not memory that a worker shares
    except RuntimeError as error:  # grain's, of a worker that was killed or ran out of memory
        rule = f"a process that reads the training images is gone: {first_line(error)}"
        raise InputError("data.num_workers", num_workers, rule) from error
    finally:
        iterator.close()


class StreamedBatches:
    """Batches that a thread brings to the device ahead of the step; see `read_batches`.

    Args:
      batches: decoded batches with their unreadable rows, from `read_batches`.
      size: S, batches that a call of the training program takes; fewer are padded.
      put: brings uint8 [1, b, H, W, C] to the device.

    Attributes:
      unreadable: rows that could not be read, of the batches taken so far.
    """

    def __init__(self, batches: Iterator[Any], *, size: int, put: Callable[..., Any]):
        self._size, self.unreadable = size, set[int]()
        self._queue: queue.Queue[Any] = queue.Queue(DEVICE_BUFFER)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._bring, args=(batches, put), daemon=True)
        self._thread.start()

    def take(self, step: int, count: int) -> tuple[Any, None]:
        """The batches of the next `count` steps, uint8 [S, B, H, W, C] on the device, and no index.

        Args:
          step: the first of these steps, one after the last that was taken.
          count: at most S.

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
        """Ends thread and workers; what they have decoded is dropped."""
        self._closed.set()
        self._thread.join(timeout=30)  # it is a daemon: a disk that hangs does not hold the run

    def _bring(self, batches: Any, put: Callable[..., Any]) -> None:
        try:
            for images, unreadable in batches:
                if not self._offer((put(images[None]), unreadable)):
                    return
        except Exception as error:  # the thread that takes it raises it
            self._offer(error)
        finally:
            batches.close()
            gc.collect()  # grain's last arrays, in cycles, hold memory that is shared with workers

    def _offer(self, item: Any) -> bool:
        """Puts an item into the queue, unless there is no more need of it."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
