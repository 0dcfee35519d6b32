"""The order in which a run sees its data, as a function of (seed, step) alone.

An epoch is a permutation of the training set; what does not fill a batch is left out of it. Since
nothing is remembered from one step to the next, a resumed run goes on with the very next batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int


class BatchOrder:
    """Rows of the training set that make up each batch.

    Args:
      num_images: size of the training set.
      batch_size: images per batch, at most `num_images`.
      seed: seed of all permutations.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.steps_per_epoch = num_images // batch_size
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def __reduce__(self) -> tuple[type, tuple[int, int, int]]:  # without what is cached
        return BatchOrder, (self.num_images, self.batch_size, self.seed)

    def _make_permutation(self, epoch: int) -> Int[np.ndarray, " n"]:
        rng = np.random.default_rng([self.seed, epoch])
        return rng.permutation(self.num_images).astype(np.int32)

    def batches(self, step: int, count: int, *, size: int) -> Int[np.ndarray, "S B"]:
        """Rows of the batches of steps `step` ... `step + count - 1`, padded to `size` batches."""
        index = np.zeros((size, self.batch_size), np.int32)
        for i in range(count):
            epoch, position = divmod(step + i, self.steps_per_epoch)
            start = position * self.batch_size
            index[i] = self._permutation(epoch)[start : start + self.batch_size]
        return index


class ResidentBatches:
    """Batches of a training set that is on the device: their rows.

    Args:
      images: uint8 [n, H, W, C], on the device.
      order: which rows make up each batch.
      size: S, batches that a call of the training program takes; fewer are padded.
      batch_shape: of the rows of a batch, as the program expects them.
      put: brings int32 [S, *batch_shape] to where the program expects it.
    """

    def __init__(
        self,
        images: Any,
        order: BatchOrder,
        *,
        size: int,
        batch_shape: tuple[int, ...],
        put: Callable[..., Any],
    ):
        self._images, self._order, self._put = images, order, put
        self._size, self._batch_shape = size, batch_shape

    def take(self, step: int, count: int) -> tuple[Any, Any]:
        """What the program wants for steps `step` ... `step + count - 1`: images and index."""
        rows = self._order.batches(step, count, size=self._size)
        return self._images, self._put(rows.reshape(self._size, *self._batch_shape))
