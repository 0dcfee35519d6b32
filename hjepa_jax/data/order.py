"""The order of the training images in a run, as a function of (seed, step) alone.

An epoch is a random permutation of the training set; a last batch that is not full is dropped. No
state is kept between steps, so a resumed run continues with the very next batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int


class BatchOrder:
    """The rows of the training set in each batch.

    Args:
      num_images: size of the training set.
      batch_size: images per batch, at most `num_images`.
      seed: seed of all permutations.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.steps_per_epoch = num_images // batch_size
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def __reduce__(self) -> tuple[type, tuple[int, int, int]]:  # pickled without the cache
        return BatchOrder, (self.num_images, self.batch_size, self.seed)

    def _make_permutation(self, epoch: int) -> Int[np.ndarray, " n"]:
        rng = np.random.default_rng([self.seed, epoch])
        return rng.permutation(self.num_images).astype(np.int32)

    def batches(self, step: int, count: int, *, size: int) -> Int[np.ndarray, "S B"]:
        """Returns the rows for steps `step` ... `step + count - 1`, zero-padded to `size` steps."""
        index = np.zeros((size, self.batch_size), np.int32)
        for i in range(count):
            epoch, position = divmod(step + i, self.steps_per_epoch)
            start = position * self.batch_size
            index[i] = self._permutation(epoch)[start : start + self.batch_size]
        return index


class ResidentBatches:
    """Batches of a training set that is on the device: all images, and the rows of each batch.

    Args:
      images: uint8 [n, H, W, C], on the device.
      order: rows of each batch.
      size: S, batches per call of the training program; fewer are padded.
      batch_shape: shape in which the program expects the rows of a batch.
      put: copies int32 [S, *batch_shape] to the device.
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
        """Returns images and rows for steps `step` ... `step + count - 1`."""
        rows = self._order.batches(step, count, size=self._size)
        return self._images, self._put(rows.reshape(self._size, *self._batch_shape))
