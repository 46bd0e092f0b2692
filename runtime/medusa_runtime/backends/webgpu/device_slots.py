"""The KV cache on a WebGPU device: for each slot, a buffer for each tensor. Small graphs edit the entries there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from medusa_runtime.arrays import IntArray
from medusa_runtime.backends.ort_library import ort
from medusa_runtime.backends.webgpu.adapters import Adapter, held
from medusa_runtime.backends.webgpu.running import run
from medusa_runtime.bundle.cache_layout import FROM, SOURCES, TARGETS, CacheLayout, CacheTensor
from medusa_runtime.bundle.manifest import CACHE
from medusa_runtime.errors import BackendError, CapacityError, first_line

DTYPES = {"float": np.float32, "float16": np.float16}
Buffers = dict[str, Any]  # a cache tensor's name -> its OrtValue, [1, H, S, D]


class DeviceSlots:
    """The cache of some slots. Each slot has buffers of its own, so exchanging two slots moves nothing.

    Args:
        layout: the tensors.
        editor: a session of the bundle's graph that edits a cache.
        adapter: the device.
    """

    def __init__(self, layout: CacheLayout, editor: ort.InferenceSession, adapter: Adapter) -> None:
        self._layout, self._adapter = layout, adapter
        self._memory = adapter.device.memory_info(ort.OrtDeviceMemoryType.DEFAULT)
        self._editor: ort.InferenceSession | None = editor
        self._slots: list[Buffers] = []
        self._zeros = {tensor.name: self._buffer(tensor, 1) for tensor in layout.tensors}  # one entry each
        self.capacity = 0

    @property
    def num_slots(self) -> int:
        """How many sequences it has room for."""
        return len(self._slots)

    def tensors(self, slot: int) -> Iterator[tuple[CacheTensor, Any]]:
        """Every tensor with a slot's buffer, [1, H, S, D]."""
        for tensor in self._layout.tensors:
            yield tensor, self._slots[slot][tensor.name]

    def resize(self, num_slots: int, capacity: int, lengths: Sequence[int]) -> None:
        """Take other buffers, in which slot i has its first ``lengths[i]`` entries and the rest is zero.

        Raises:
            CapacityError: the device has no memory for it. The cache is as it was before.
        """
        kept = [*lengths, *[0] * num_slots][:num_slots]
        try:
            slots = [{tensor.name: self._buffer(tensor, capacity) for tensor in self._layout.tensors} for _ in range(num_slots)]
            for buffers in slots:  # memory that the device does not have is noticed when it is used
                self._edit(buffers, self._zeros, np.zeros(1, np.int64), np.zeros(1, np.int64))
        except BackendError:  # a lost device, or a graph that it cannot run
            raise
        except Exception as error:  # too little memory, or ONNX Runtime's errors, which have no common base but this
            what = f"the device has no memory for a cache of {num_slots} times {capacity} entries"
            raise CapacityError(f"{what} ({first_line(error)})") from error
        for slot, length in enumerate(kept):
            if length:
                self._edit(slots[slot], self._slots[slot], np.arange(length), np.arange(length))
        self._slots, self.capacity = slots, capacity

    def move(self, slot: int, start: int, nodes: IntArray) -> None:
        """Move a slot's entries at ``start + nodes`` to ``start, start + 1 …``. nodes: [A], ascending."""
        moved = np.flatnonzero(nodes != np.arange(len(nodes)))  # entries that are in place already are not moved
        if len(moved):
            self._edit(self._slots[slot], self._slots[slot], start + nodes[moved], start + moved)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        if length and source != target:
            self._edit(self._slots[target], self._slots[source], np.arange(length), np.arange(length))

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots."""
        self._slots[a], self._slots[b] = self._slots[b], self._slots[a]

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Zero a slot's entries from `start` to `stop`."""
        if start < stop:
            self._edit(self._slots[slot], self._zeros, np.zeros(stop - start, np.int64), np.arange(start, stop))

    def free(self) -> None:
        """Give all memory back. The slots cannot be used any more."""
        self._slots, self._zeros, self._editor, self.capacity = [], {}, None, 0

    def _edit(self, into: Buffers, out_of: Buffers, sources: IntArray, targets: IntArray) -> None:
        """Copy entries between the buffers of two slots, which may be the same: all are read before one is written."""
        assert self._editor is not None
        binding = held(self._editor.io_binding())
        binding.bind_cpu_input(SOURCES, np.ascontiguousarray(sources, np.int64))
        binding.bind_cpu_input(TARGETS, np.ascontiguousarray(targets, np.int64))
        for tensor in self._layout.tensors:
            binding.bind_ortvalue_input(FROM + tensor.name, out_of[tensor.name])
            binding.bind_ortvalue_input(tensor.past, into[tensor.name])
            binding.bind_ortvalue_output(tensor.present, into[tensor.name])
        run(self._editor, binding, CACHE, self._adapter)

    def _buffer(self, tensor: CacheTensor, capacity: int) -> Any:
        """A buffer of zeros. What the device gives may hold anything."""
        shape, dtype = tensor.shape(1, capacity), DTYPES[tensor.dtype]
        buffer = held(ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, memory_info=self._memory))
        ort.copy_tensors([ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))], [buffer])
        return buffer
