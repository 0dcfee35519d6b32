"""Which device holds what: a mesh of all devices, and how arrays are laid out on it.

    placement = make_placement(jax.devices(), fsdp=4)
    state = placement.put(state, placement.state(state))     # parameters cut in four
    index = placement.put(index, placement.batches)          # rows of a batch on all devices
    params = placement.local(state.params)                   # whole, for this process alone

The mesh has two axes. A batch is cut along both; a parameter, its EMA and its optimizer state along
`fsdp` only, so that each group of `fsdp` devices holds them once. XLA partitions the training step
by itself: means and statistics over a batch (VICReg) remain those of the whole batch.
"""

import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from hjepa_jax.errors import InputError
from hjepa_jax.runtime.host_memory import machine_bytes

AXES = ("data", "fsdp")
# Elements. To bring a smaller array together costs more in latency than it saves in memory.
MIN_SHARDED_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Placement:
    """Layouts over a mesh; a single device needs none, and they all are None.

    Attributes:
      mesh: devices [num_devices / fsdp, fsdp] of all processes; None for a single device.
    """

    mesh: Mesh | None

    def _sharding(self, *spec: Any) -> Any:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*spec))

    @property
    def whole(self) -> Any:
        """A full copy on every device."""
        return self._sharding()

    @property
    def rows(self) -> Any:
        """[B, ...], cut along B over all devices."""
        return self._sharding(AXES)

    @property
    def batches(self) -> Any:
        """[S, B, ...], cut along B over all devices."""
        return self._sharding(None, AXES)

    @property
    def parts(self) -> Any:
        """[S, parts, B / parts, ...], so cut that every device has images of every part."""
        return self._sharding(None, None, AXES)

    def batches_of(self, batch_shape: tuple[int, ...]) -> Any:
        """The layout of batches of this shape: (B,), or (parts, B / parts) for accumulation."""
        return self.batches if len(batch_shape) == 1 else self.parts

    def state(self, tree: Any) -> Any:
        """How each array of a state, or of its parameters, is cut along `fsdp`; a like tree."""
        if self.mesh is None:
            return None
        fsdp = self.mesh.shape["fsdp"]

        def layout(x: Any) -> NamedSharding:
            axis = sharded_axis(x.shape, fsdp)
            return self.whole if axis is None else self._sharding(*[None] * axis, "fsdp")

        return jax.tree.map(layout, tree)

    def put(self, tree: Any, shardings: Any) -> Any:
        """Lays arrays of the host, the same in each process, out on the devices.

        Args:
          tree: arrays.
          shardings: a tree like it, or one sharding for all.
        """
        if self.mesh is None or self.whole.is_fully_addressable:
            return jax.device_put(tree, shardings)
        if isinstance(shardings, NamedSharding):
            shardings = jax.tree.map(lambda _: shardings, tree)

        def lay_out(x: Any, sharding: NamedSharding) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(lay_out, tree, shardings)

    def put_own_batches(
        self, x: Shaped[np.ndarray, "S b ..."], batch_shape: tuple[int, ...]
    ) -> Shaped[jax.Array, "S ..."]:
        """Lays out batches of which each process has its own rows.

        Args:
          x: of each part of the batch, the rows of this process, one part after the other.
          batch_shape: see `batches_of`.
        """
        x = x.reshape(len(x), *batch_shape[:-1], -1, *x.shape[2:])
        if self.mesh is None:
            return jax.device_put(x)
        return jax.make_array_from_process_local_data(self.batches_of(batch_shape), x)

    def gathered(self, tree: Any) -> Any:
        """Within a program: the arrays of `tree`, of which every device is to have all."""
        if self.mesh is None or self.mesh.shape["fsdp"] == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.whole)

    def local(self, tree: Any) -> Any:
        """Full copies on this process's first device; all processes must call it."""
        if self.mesh is not None and not self.whole.is_fully_addressable:
            tree = jax.jit(_same, out_shardings=self.whole)(tree)
            tree = jax.tree.map(lambda x: x.addressable_data(0), tree)
        return jax.device_put(tree, jax.local_devices()[0])


def check_resident(source: str, num_bytes: int) -> None:
    """Refuses training images that do not fit on each device, before they are decoded.

    Every device holds all of them: the images of a batch are drawn from the whole set, so devices
    that held a part each would have to exchange every batch.

    Raises:
      InputError: when a device has less memory ("data.source").
    """
    device = jax.local_devices()[0]
    memory, what = _device_bytes(device), f"each {device.platform} device"
    if memory is not None and num_bytes > memory:
        rule = (
            f"needs {num_bytes / 2**30:.2f} GiB for the training images on {what}, which has "
            f"{memory / 2**30:.2f} GiB; data.streaming=always reads tfds: and folder: sources "
            "image by image"
        )
        raise InputError("data.source", source, rule)


def _device_bytes(device: Any) -> int | None:
    """Memory for arrays on one device of this process; None if the backend does not say."""
    if device.platform == "cpu":
        if not hasattr(os, "sysconf"):  # Windows
            return None
        return machine_bytes() // jax.local_device_count()
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def sharded_axis(shape: tuple[int, ...], fsdp: int) -> int | None:
    """The dimension along which an array is cut in `fsdp` parts: the largest that it divides.

    None where there is none, or the array has less than `MIN_SHARDED_SIZE` elements: every device
    then has all of it.
    """
    divisible = [axis for axis, n in enumerate(shape) if n % fsdp == 0]
    if fsdp == 1 or not divisible or math.prod(shape) < MIN_SHARDED_SIZE:
        return None
    return max(divisible, key=lambda axis: shape[axis])


def _same(tree: Any) -> Any:
    return tree


def make_placement(devices: list[Any], *, fsdp: int) -> Placement:
    """A placement on `devices`, those of one process side by side.

    Args:
      devices: of all processes, in any order.
      fsdp: over how many of them parameters are cut; it divides their number. Neighbours share
        them, so that what is brought together in every step stays within a machine where it can.
    """
    if len(devices) == 1:
        return Placement(None)
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Placement(Mesh(np.array(devices).reshape(-1, fsdp), AXES))
