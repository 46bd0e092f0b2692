"""The KV cache in the host's memory: NumPy arrays that the step graph reads and writes in place."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import IntArray
from medusa_runtime.bundle.cache_layout import CacheLayout, CacheTensor
from medusa_runtime.errors import CapacityError

DTYPES = {"float": np.float32, "float16": np.float16}
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows
Array = npt.NDArray[np.floating]


class HostCache:
    """The tensors of a cache for some slots. Tensors of equal shape lie in one array, so that moving entries is one assignment.

    Args:
        layout: the tensors.
        num_slots: sequences that it has room for.
        capacity: S, entries of each slot.

    Raises:
        CapacityError: there is no memory for it.
    """

    def __init__(self, layout: CacheLayout, num_slots: int, capacity: int) -> None:
        self.layout, self.num_slots, self.capacity = layout, num_slots, capacity
        self.arrays = [_zeros(group, num_slots, capacity) for group in layout.groups]  # each [N, slots, H, S, D]

    def tensors(self, first_slot: int, batch: int) -> Iterator[tuple[CacheTensor, Array]]:
        """Every tensor with the part of it that belongs to some neighbouring slots: [B, H, S, D], contiguous."""
        for group, array in zip(self.layout.groups, self.arrays, strict=True):
            yield from zip(group, array[:, first_slot : first_slot + batch], strict=True)

    def move(self, slot: int, start: int, nodes: IntArray) -> None:
        """Move a slot's entries at ``start + nodes`` to ``start, start + 1 …``. nodes: [A], ascending."""
        first = int(np.argmax(nodes != np.arange(len(nodes))))  # entries that are in place already are not moved
        if nodes[first] == first:
            return
        targets, sources = slice(start + first, start + len(nodes)), start + nodes[first:]
        for array in self.arrays:
            entries = array[:, slot]  # [N, H, S, D]
            entries[:, :, targets] = entries[:, :, sources]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        for array in self.arrays:
            array[:, target, :, :length] = array[:, source, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` entries of two slots."""
        for array in self.arrays:
            for tensor in array[:, :, :, :length]:  # [slots, H, length, D]
                one = tensor[a].copy()  # small enough for the processor's cache
                tensor[a] = tensor[b]
                tensor[b] = one

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Zero a slot's entries from `start` to `stop`."""
        for array in self.arrays:
            array[:, slot, :, start:stop] = 0

    def take(self, other: HostCache, lengths: Sequence[int]) -> None:
        """Copy the first entries of another cache's slots, ``lengths[i]`` of slot i."""
        for array, source in zip(self.arrays, other.arrays, strict=True):
            for slot, length in enumerate(lengths):
                array[:, slot, :, :length] = source[:, slot, :, :length]


def _zeros(group: tuple[CacheTensor, ...], num_slots: int, capacity: int) -> Array:
    """Zeros that take memory only as they are written to. NumPy would take huge pages, as soon as a slot is begun."""
    dtype = np.dtype(DTYPES[group[0].dtype])
    shape = (len(group), *group[0].shape(num_slots, capacity))
    try:
        memory = mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1), **PRIVATE)
    except (OSError, OverflowError) as error:
        raise CapacityError(f"no memory for a cache of {num_slots} times {capacity} entries") from error
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
