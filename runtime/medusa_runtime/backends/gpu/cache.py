"""The KV cache on a GPU: one preallocated piece of memory. Steps read and write their slots in it, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from medusa_runtime.arrays import IntArray
from medusa_runtime.backends.gpu.buffers import Tensor, aligned
from medusa_runtime.backends.gpu.driver import Block, Gpu
from medusa_runtime.bundle.cache_layout import CacheLayout, CacheTensor

SWAP_ENTRIES = 64  # entries that are exchanged at a time, through spare memory of that size


class _Group:
    """Tensors of equal shape that lie one after another, [N, slots, H, S, D], from a place in the cache's memory on.

    Entries are moved in all of its tensors and heads by one copy.
    """

    def __init__(self, tensors: tuple[CacheTensor, ...], offset: int, num_slots: int, capacity: int) -> None:
        self.tensors, self.offset, self.num_heads = tensors, offset, tensors[0].heads
        self.num_slots, self.capacity = num_slots, capacity
        self.entry = tensors[0].width * tensors[0].item_bytes  # bytes of an entry in one head
        self.slot = self.num_heads * capacity * self.entry
        self.num_bytes = len(tensors) * num_slots * self.slot

    def block(self, address: int, slot: int, start: int, count: int) -> Block:
        """Some entries of a slot, in all tensors and heads. address: of the memory that the group lies in."""
        return Block(
            address=address + self.offset + slot * self.slot + start * self.entry,
            width=count * self.entry,
            height=self.num_heads,
            depth=len(self.tensors),
            pitch=self.capacity * self.entry,
            rows=self.num_slots * self.num_heads,
        )


def _groups(layout: CacheLayout, num_slots: int, capacity: int) -> list[_Group]:
    groups, offset = [], 0
    for tensors in layout.groups:
        groups.append(_Group(tensors, offset, num_slots, capacity))
        offset = aligned(offset + groups[-1].num_bytes)
    return groups


class DeviceCache:
    """The cache of some slots, in one allocation. Tensors of equal shape lie side by side, [N, slots, H, S, D].

    A tensor's entries of some neighbouring slots are one tensor [B, H, S, D]. Entries are moved by one copy for each group of
    equal tensors, which is queued on the GPU's stream.

    Args:
        gpu: the GPU that holds it.
        layout: the tensors.
        num_slots: sequences that it has room for.
        capacity: S, entries of each slot.

    Raises:
        CapacityError: the GPU has no memory for it.
    """

    def __init__(self, gpu: Gpu, layout: CacheLayout, num_slots: int, capacity: int) -> None:
        self._gpu = gpu
        self.num_slots, self.capacity = num_slots, capacity
        self._groups = _groups(layout, num_slots, capacity)
        self.num_bytes = _end(self._groups)
        what = f"a cache of {num_slots} times {capacity} entries"
        self._memory = gpu.allocate(self.num_bytes, what)
        self._spares = _groups(layout, 1, SWAP_ENTRIES) if num_slots > 1 else []
        self._spare = gpu.allocate(_end(self._spares), "exchanging slots")

    def tensors(self, first_slot: int, batch: int) -> Iterator[tuple[CacheTensor, Tensor]]:
        """Every tensor with the memory that belongs to some neighbouring slots, [B, H, S, D]."""
        for group in self._groups:
            for index, tensor in enumerate(group.tensors):
                address = self._memory.address + group.offset + (index * self.num_slots + first_slot) * group.slot
                yield tensor, Tensor(address, tensor.shape(batch, self.capacity))

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
                for group in self._groups:
                    self._copy(self._block(group, slot, start + target, count), self._block(group, slot, start + source, count))
            target += count

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        if length:
            for group in self._groups:
                self._copy(self._block(group, target, 0, length), self._block(group, source, 0, length))

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` entries of two slots."""
        for start in range(0, length, SWAP_ENTRIES):
            count = min(SWAP_ENTRIES, length - start)
            for group, room in zip(self._groups, self._spares, strict=True):
                one, other = self._block(group, a, start, count), self._block(group, b, start, count)
                spare = room.block(self._spare.address, 0, 0, count)
                self._copy(spare, one)
                self._copy(one, other)
                self._copy(other, spare)

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Zero a slot's entries from `start` to `stop`."""
        if start < stop:
            for group in self._groups:
                self._gpu.clear_block(self._block(group, slot, start, stop - start))

    def take(self, other: DeviceCache, lengths: Sequence[int]) -> None:
        """Copy the first entries of another cache's slots, ``lengths[i]`` of slot i. Both have one layout."""
        for slot, length in enumerate(lengths):
            if length:
                for group, source in zip(self._groups, other._groups, strict=True):
                    self._copy(self._block(group, slot, 0, length), other._block(source, slot, 0, length))

    def _copy(self, target: Block, source: Block) -> None:
        self._gpu.copy_block(target, source)

    def _block(self, group: _Group, slot: int, start: int, count: int) -> Block:
        return group.block(self._memory.address, slot, start, count)


def _end(groups: list[_Group]) -> int:
    return groups[-1].offset + groups[-1].num_bytes if groups else 0
