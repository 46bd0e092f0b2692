"""The cache's slots: which sequence has which, what is still cached of earlier ones, and how large the cache is.

Sequences that decode have the first slots, without gaps, so that one step runs on all of them; the one whose prompt is being
read has one behind them. The others are free, and keep what their last sequence left: a later prompt that begins alike starts
from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from medusa_runtime.backends.base import Backend
from medusa_runtime.decoding.sequence import Sequence

# A cache that was SHRINK times larger than needed for PATIENCE sequences in a row is made smaller: attention over a portable
# graph costs what is allocated. What free slots hold beyond the new size is given up, so one short request must not do it.
SHRINK, PATIENCE = 4, 8
MIN_CAPACITY = 256  # entries a slot; below, the cache is not made smaller


@dataclass
class _Slot:
    token_ids: list[int] = field(default_factory=list)  # whose entries are cached
    written: int = 0  # entries that may hold anything but zero
    sequence: Sequence | None = None
    last_used: int = 0


class SlotPool:
    """Places sequences in the cache of a backend.

    Args:
        backend: its cache is this object's alone.
        num_slots: sequences at a time.
        reuse_prefixes: let a prompt begin with entries that an earlier one left.
    """

    def __init__(self, backend: Backend, num_slots: int, *, reuse_prefixes: bool = True) -> None:
        self._backend = backend
        self._slots = [_Slot() for _ in range(num_slots)]
        self._reuse_prefixes = reuse_prefixes
        self._fixed = backend.manifest.limits.capacity
        self._clock = itertools.count(1)
        self._num_small = 0  # sequences admitted since the cache was last of use in its size
        self.num_decoding = 0
        if self._fixed:
            self._fit(self._fixed)  # what is too large shows now, not at the first request

    @property
    def num_slots(self) -> int:
        """Sequences at a time."""
        return len(self._slots)

    @property
    def num_active(self) -> int:
        """Slots that a sequence has."""
        return sum(slot.sequence is not None for slot in self._slots)

    @property
    def decoding(self) -> list[Sequence]:
        """The sequences that decode, in the order of their slots, which are 0, 1, 2 …."""
        return [slot.sequence for slot in self._slots[: self.num_decoding] if slot.sequence is not None]

    def admit(self, sequence: Sequence) -> int:
        """Give a sequence the slot behind those that decode. Returns how many of its prompt's tokens are cached there already.

        There must be a free slot, and no other sequence whose prompt is being read.

        Raises:
            CapacityError: there is no memory for its prompt.
        """
        place = self.num_decoding
        assert self._slots[place].sequence is None
        self._num_small += 1
        self._fit(len(sequence.prompt_ids))
        source, common = self._longest_prefix(sequence.prompt_ids)
        target = self._oldest_free() if self._reuse_prefixes else place
        if self._slots[source].sequence is None and 2 * common >= len(self._slots[source].token_ids):
            target = source  # most of what is cached there is used: take it where it is
        if target != source and common:
            self._backend.copy(source, target, common)
        slot = self._slots[target]
        slot.token_ids, slot.written = list(sequence.prompt_ids[:common]), max(slot.written, common)
        self._swap(target, place)
        self._backend.clear(place, common, slot.written)
        slot.written = common
        slot.sequence, sequence.slot = sequence, place
        return common

    def start_decoding(self, sequence: Sequence) -> None:
        """Its prompt is read: it decodes from now on."""
        assert sequence.slot is not None
        self._swap(sequence.slot, self.num_decoding)
        self.num_decoding += 1

    def extend(self, sequence: Sequence, token_ids: Tokens[int]) -> None:
        """These tokens' entries are cached now, after those before."""
        assert sequence.slot is not None
        self._slots[sequence.slot].token_ids += token_ids

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's slot. What is cached stays there."""
        place = sequence.slot
        assert place is not None
        slot = self._slots[place]
        slot.sequence, sequence.slot, slot.last_used = None, None, next(self._clock)
        if place < self.num_decoding:
            self.num_decoding -= 1
            self._swap(place, self.num_decoding)

    def reserve(self, first: int, lengths: Tokens[int], new_tokens: int) -> None:
        """Make room in some neighbouring slots for new entries after those there are.

        Args:
            first: the first of the slots.
            lengths: entries that each of them holds.
            new_tokens: entries that a step will write after these.

        Raises:
            CapacityError: there is no memory for so many.
        """
        self._fit(max(lengths) + new_tokens)
        for slot, length in zip(self._slots[first:], lengths, strict=False):
            slot.written = max(slot.written, length + new_tokens)

    def _fit(self, needed: int) -> None:
        """Make the cache large enough, or smaller where it has long been far too large."""
        if self._fixed:
            if self._backend.num_slots < self.num_slots or self._backend.capacity < self._fixed:
                self._resize(self._fixed)
            return
        active = [(slot, slot.sequence) for slot in self._slots if slot.sequence is not None]
        needed = max([needed, *(max(len(slot.token_ids), len(sequence.prompt_ids)) for slot, sequence in active)])
        capacity = self._backend.capacity
        if capacity < max(SHRINK * needed, MIN_CAPACITY):
            self._num_small = 0
        if self._backend.num_slots < self.num_slots or needed > capacity or self._num_small >= PATIENCE:
            self._num_small = 0
            self._resize(needed)

    def _resize(self, capacity: int) -> None:
        for slot in self._slots:
            del slot.token_ids[capacity:]
        kept = [len(slot.token_ids) for slot in self._slots[: self._backend.num_slots]]
        self._backend.resize(self.num_slots, capacity, kept)
        for slot in self._slots:
            slot.written = len(slot.token_ids)

    def _longest_prefix(self, prompt_ids: Tokens[int]) -> tuple[int, int]:
        """The slot that holds most of a prompt's beginning, and how much; at least one token is left to be read."""
        if not self._reuse_prefixes:
            return 0, 0
        lengths = [_num_common(slot.token_ids, prompt_ids[:-1]) for slot in self._slots]
        longest = max(lengths)
        return lengths.index(longest), longest

    def _oldest_free(self) -> int:
        free = [place for place, slot in enumerate(self._slots) if slot.sequence is None]
        return min(free, key=lambda place: (bool(self._slots[place].token_ids), self._slots[place].last_used))

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        one, other = self._slots[a], self._slots[b]
        self._backend.swap(a, b, max(len(one.token_ids), len(other.token_ids)))
        one.written = other.written = max(one.written, other.written)
        self._slots[a], self._slots[b] = other, one
        for place in (a, b):
            if (sequence := self._slots[place].sequence) is not None:
                sequence.slot = place


def _num_common(a: Tokens[int], b: Tokens[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
