"""A mesh of all devices, and the layout of arrays on it.

    placement = make_placement(jax.devices(), fsdp=4)
    state = placement.put(state, placement.state(state))     # parameters sharded over 4 devices
    index = placement.put(index, placement.batches)          # batches sharded over all devices
    params = placement.local(state.params)                   # full copies in this process

The mesh has two axes. A batch is sharded over both. Parameters, their EMA and the optimizer state
are sharded over `fsdp` only, so that each group of `fsdp` devices holds them once. XLA partitions
the training step: means and statistics over a batch (VICReg) still cover the whole batch.
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
# Number of elements. Smaller arrays are not sharded: gathering them costs more than it saves.
MIN_SHARDED_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Placement:
    """Layouts over a mesh. For a single device all layouts are None.

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
        """[B, ...], sharded along B over all devices."""
        return self._sharding(AXES)

    @property
    def batches(self) -> Any:
        """[S, B, ...], sharded along B over all devices."""
        return self._sharding(None, AXES)

    @property
    def parts(self) -> Any:
        """[S, parts, B / parts, ...], sharded so that every device has images of every part."""
        return self._sharding(None, None, AXES)

    def batches_of(self, batch_shape: tuple[int, ...]) -> Any:
        """Returns the layout of batches of shape (B,), or (parts, B / parts) for accumulation."""
        return self.batches if len(batch_shape) == 1 else self.parts

    def state(self, tree: Any) -> Any:
        """Returns a tree with the layout of each array of a state or of its parameters."""
        if self.mesh is None:
            return None
        fsdp = self.mesh.shape["fsdp"]

        def layout(x: Any) -> NamedSharding:
            axis = sharded_axis(x.shape, fsdp)
            return self.whole if axis is None else self._sharding(*[None] * axis, "fsdp")

        return jax.tree.map(layout, tree)

    def put(self, tree: Any, shardings: Any) -> Any:
        """Puts host arrays, the same in each process, on the devices.

        Args:
          tree: the arrays.
          shardings: a tree of shardings, or one sharding for all.
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
        """Puts batches on the devices; each process passes its own rows.

        Args:
          x: the rows of this process in each part of the batch, one part after the other.
          batch_shape: see `batches_of`.
        """
        x = x.reshape(len(x), *batch_shape[:-1], -1, *x.shape[2:])
        if self.mesh is None:
            return jax.device_put(x)
        return jax.make_array_from_process_local_data(self.batches_of(batch_shape), x)

    def gathered(self, tree: Any) -> Any:
        """Inside jit: gathers the arrays of `tree`, so that every device has a full copy."""
        if self.mesh is None or self.mesh.shape["fsdp"] == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.whole)

    def local(self, tree: Any) -> Any:
        """Returns full copies on this process's first device; all processes must call this."""
        if self.mesh is not None and not self.whole.is_fully_addressable:
            tree = jax.jit(_same, out_shardings=self.whole)(tree)
            tree = jax.tree.map(lambda x: x.addressable_data(0), tree)
        return jax.device_put(tree, jax.local_devices()[0])


def check_resident(source: str, num_bytes: int) -> None:
    """Refuses training images that do not fit on each device, before they are decoded.

    Every device holds all of them. A batch is drawn from the whole set, so devices that hold only a
    part of the set would have to exchange every batch.

    Raises:
      InputError: if a device has less memory ("data.source").
    """
    device = jax.local_devices()[0]
    memory, what = device_bytes(device), f"each {device.platform} device"
    if memory is not None and num_bytes > memory:
        rule = (
            f"needs {num_bytes / 2**30:.2f} GiB for the training images on {what}, which has "
            f"{memory / 2**30:.2f} GiB; data.streaming=always reads tfds: and folder: sources "
            "image by image"
        )
        raise InputError("data.source", source, rule)


def device_bytes(device: Any) -> int | None:
    """Returns the memory for arrays on one device of this process; None if unknown."""
    if device.platform == "cpu":
        if not hasattr(os, "sysconf"):  # Windows
            return None
        return machine_bytes() // jax.local_device_count()
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def sharded_axis(shape: tuple[int, ...], fsdp: int) -> int | None:
    """Returns the axis to shard an array along: the largest one that `fsdp` divides.

    None if there is no such axis, or the array has fewer than `MIN_SHARDED_SIZE` elements: every
    device then holds a full copy.
    """
    divisible = [axis for axis, n in enumerate(shape) if n % fsdp == 0]
    if fsdp == 1 or not divisible or math.prod(shape) < MIN_SHARDED_SIZE:
        return None
    return max(divisible, key=lambda axis: shape[axis])


def _same(tree: Any) -> Any:
    return tree


def make_placement(devices: list[Any], *, fsdp: int) -> Placement:
    """Returns a placement on `devices`, with the devices of one process side by side.

    Args:
      devices: the devices of all processes, in any order.
      fsdp: number of devices that share the parameters; it divides the number of devices. Devices
        of one machine share them if possible, so that gathering stays within the machine.
    """
    if len(devices) == 1:
        return Placement(None)
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Placement(Mesh(np.array(devices).reshape(-1, fsdp), AXES))
