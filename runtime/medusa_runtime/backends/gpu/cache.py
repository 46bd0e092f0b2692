"""The KV cache on a GPU: one preallocated piece of memory. Steps read and write their slots in it, in place."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_runtime.arrays import IntArray
from medusa_runtime.backends.gpu.driver import Block, Gpu
from medusa_runtime.bundle.manifest import ModelFacts

SWAP_ENTRIES = 64  # entries that are exchanged at a time, through spare memory of that size


class DeviceCache:
    """Keys and values of all layers, [L, 2, slots, Hkv, S, D], in one allocation.

    A layer's keys of some neighbouring slots are one tensor [B, Hkv, S, D]. Entries are moved in all layers and heads at once,
    by one copy that is queued on the GPU's stream.

    Args:
        gpu: the GPU that holds it.
        model: the model's shape.
        item_size: bytes of a number.
        num_slots: sequences that it has room for.
        capacity: S, entries of each slot.

    Raises:
        CapacityError: the GPU has no memory for it.
    """

    def __init__(self, gpu: Gpu, model: ModelFacts, item_size: int, num_slots: int, capacity: int) -> None:
        self._gpu = gpu
        self.num_slots, self.capacity = num_slots, capacity
        self._num_tensors, self._num_heads = 2 * model.num_layers, model.num_kv_heads
        self._entry = model.head_dim * item_size  # bytes of an entry in one head
        self._slot = self._num_heads * capacity * self._entry
        self.num_bytes = self._num_tensors * num_slots * self._slot
        what = f"a cache of {num_slots} times {capacity} entries"
        self._memory = gpu.allocate(self.num_bytes, what)
        spare = self._num_tensors * self._num_heads * SWAP_ENTRIES * self._entry if num_slots > 1 else 0
        self._spare = gpu.allocate(spare, "exchanging slots")

    def address(self, layer: int, part: int, first_slot: int) -> int:
        """The address of a layer's keys (part 0) or values (part 1) of a slot."""
        return self._memory.address + ((2 * layer + part) * self.num_slots + first_slot) * self._slot

    def move(self, slot: int, start: int, nodes: IntArray) -> None:
        """Move a slot's entries at ``start + nodes`` to ``start, start + 1 …``. nodes: [A], ascending."""
        target = 0
        while target < len(nodes):
            source = int(nodes[target])
            longest = max(1, source - target)  # a longer copy would overlap itself
            count = 1
            while count < longest and target + count < len(nodes) and nodes[target + count] == source + count:
                count += 1
            if source != target:
                self._copy(self._block(slot, start + target, count), self._block(slot, start + source, count))
            target += count

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        if length:
            self._copy(self._block(target, 0, length), self._block(source, 0, length))

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` entries of two slots."""
        for start in range(0, length, SWAP_ENTRIES):
            count = min(SWAP_ENTRIES, length - start)
            one, other, spare = self._block(a, start, count), self._block(b, start, count), self._spare_block(count)
            self._copy(spare, one)
            self._copy(one, other)
            self._copy(other, spare)

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Zero a slot's entries from `start` to `stop`."""
        if start < stop:
            self._gpu.clear_block(self._block(slot, start, stop - start))

    def take(self, other: DeviceCache, lengths: Sequence[int]) -> None:
        """Copy the first entries of another cache's slots, ``lengths[i]`` of slot i."""
        for slot, length in enumerate(lengths):
            if length:
                self._copy(self._block(slot, 0, length), other._block(slot, 0, length))

    def _copy(self, target: Block, source: Block) -> None:
        self._gpu.copy_block(target, source)

    def _block(self, slot: int, start: int, count: int) -> Block:
        """Some entries of a slot, in all layers and heads."""
        return Block(
            address=self._memory.address + slot * self._slot + start * self._entry,
            width=count * self._entry,
            height=self._num_heads,
            depth=self._num_tensors,
            pitch=self.capacity * self._entry,
            rows=self.num_slots * self._num_heads,
        )

    def _spare_block(self, count: int) -> Block:
        width, heads = count * self._entry, self._num_heads
        pitch = SWAP_ENTRIES * self._entry
        return Block(self._spare.address, width, heads, self._num_tensors, pitch, heads)
