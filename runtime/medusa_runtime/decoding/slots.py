"""The cache's slots: which sequence has which slot, which entries of earlier sequences are left, and the cache's size.

Sequences that decode have the first slots, without gaps, so that one step runs on all of them. Sequences whose prompts are
being read have slots behind those. The other slots are free. They keep the entries of their last sequence: a later prompt that
begins alike starts from there.

A slot knows its sequence and how many of its entries are valid. The entries' token ids are in the sequence's `TokenBuffer`,
which the slot keeps after the sequence has ended.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from dataclasses import dataclass

from medusa_runtime.arrays import TokenBuffer
from medusa_runtime.backends.base import Backend, bucket, cache_entry_bytes
from medusa_runtime.decoding.sequence import DecodingSequence
from medusa_runtime.errors import CapacityError

# Shrink the cache once the last PATIENCE sequences each needed less than 1/SHRINK of it: attention over a portable graph costs
# what is allocated. Shrinking drops cached prefixes, hence the patience.
SHRINK, PATIENCE = 4, 8
MIN_CAPACITY = 256  # entries a slot; a smaller cache is not made smaller still
# Entries that a prompt may share with one that is being read before it waits for them instead of being read beside it.
WORTH_WAITING_FOR = 64
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheUse:
    """How much of the KV cache is used. An entry holds the keys and values of one token."""

    num_entries: int  # of the sequences that have a slot; what ended sequences left for prefix reuse does not count
    max_entries: int  # that these sequences can have at most, by the bundle's limits and the memory that the cache may take
    num_bytes: int  # allocated now


@dataclass
class Slot:
    """One sequence's part of the cache."""

    tokens: TokenBuffer | None = None  # the first `length` of these have entries here
    length: int = 0  # valid entries
    written: int = 0  # the first entries, which may be other than zero
    sequence: DecodingSequence | None = None
    last_used: int = 0

    @property
    def needed(self) -> int:
        """The fewest entries that its sequence needs."""
        return 0 if self.sequence is None else max(self.length, self.sequence.num_to_read)


class SlotPool:
    """Places sequences in the cache of a backend.

    Args:
        backend: its cache is this object's alone.
        num_slots: sequences at a time.
        reuse_prefixes: let a prompt begin with entries that an earlier one left.
        max_bytes: the largest cache, in bytes; None if only the memory limits it.

    Raises:
        CapacityError: a cache of fixed size is larger than the memory or `max_bytes`.
    """

    def __init__(self, backend: Backend, num_slots: int, *, reuse_prefixes: bool = True, max_bytes: int | None = None) -> None:
        self._backend = backend
        self._slots = [Slot() for _ in range(num_slots)]
        self._num_slots = num_slots
        self._reuse_prefixes = reuse_prefixes
        self._max_bytes = max_bytes
        self._fixed = backend.manifest.limits.capacity
        self._entry_bytes = cache_entry_bytes(backend.manifest)
        self._clock = itertools.count(1)
        self._num_small = 0  # sequences admitted in a row that needed less than 1/SHRINK of the cache
        self.num_decoding = 0
        if self._fixed:
            self._fit(self._fixed)  # a cache that is too large shows now, not at the first request

    @property
    def num_slots(self) -> int:
        """Sequences at a time."""
        return self._num_slots

    @property
    def use(self) -> CacheUse:
        """How much is used now. Another thread may ask."""
        entry_bytes = self._entry_bytes
        most = self._num_slots * (self._fixed or self._backend.manifest.limits.max_seq_len)
        if self._max_bytes is not None:
            most = min(most, self._max_bytes // entry_bytes)
        num_entries = sum(slot.length for slot in list(self._slots) if slot.sequence is not None)
        return CacheUse(num_entries, most, self._backend.num_slots * self._backend.capacity * entry_bytes)

    @property
    def active(self) -> list[DecodingSequence]:
        """The sequences that have a slot."""
        return [slot.sequence for slot in self._slots if slot.sequence is not None]

    @property
    def decoding(self) -> list[Slot]:
        """The slots of the sequences that decode, which are the slots 0, 1, 2 …."""
        return self._slots[: self.num_decoding]

    def __getitem__(self, place: int) -> Slot:
        return self._slots[place]

    def __len__(self) -> int:
        return len(self._slots)

    def place(self, sequence: DecodingSequence) -> int | None:
        """The number of a sequence's slot, or None if it has none."""
        return next((place for place, slot in enumerate(self._slots) if slot.sequence is sequence), None)

    def should_wait(self, sequence: DecodingSequence) -> bool:
        """Whether a prompt that is being read begins like this one for so long that waiting for its entries saves work."""
        if not self._reuse_prefixes or sequence.is_scored:
            return False
        _, cached = self._longest_prefix(sequence)
        return any(
            slot.tokens.num_common(sequence.tokens) > max(cached + WORTH_WAITING_FOR, slot.length)
            for slot in self._slots[self.num_decoding :]
            if slot.sequence is not None and slot.tokens is not None and slot.length < slot.sequence.num_to_read
        )

    def admit(self, sequence: DecodingSequence, *, is_long: bool) -> int:
        """Give a sequence a free slot. Returns how many of its tokens are cached there already.

        Long prompts get the last free slot and short ones the first: short ones are done sooner, and should not have to
        move a long one away from the slot behind those that decode.

        Raises:
            CapacityError: there is no memory for its prompt. No sequence has lost its slot.
        """
        self._num_small += 1
        self._fit(sequence.num_to_read, num_more=1)
        free = [place for place, slot in enumerate(self._slots) if slot.sequence is None]
        place = free[-1] if is_long else free[0]
        filled, common = self._filled_slot(sequence, place)
        if is_long and common:
            place = filled  # moving the cached entries would cost more than it saves
        slot = self._slots[filled]
        slot.tokens, slot.length, slot.written = sequence.tokens, common, max(slot.written, common)
        self._swap(filled, place)
        self._backend.clear(place, common, slot.written)
        slot.written = common
        slot.sequence = sequence
        return common

    def _filled_slot(self, sequence: DecodingSequence, place: int) -> tuple[int, int]:
        """A free slot that holds as much of a sequence's beginning as is cached anywhere, and how many tokens that is.

        Args:
            sequence: without a slot.
            place: the slot if prefixes are not used again.
        """
        if not self._reuse_prefixes:
            return place, 0
        source, common = self._longest_prefix(sequence)
        if self._slots[source].sequence is None and 2 * common >= self._slots[source].length:
            return source, common  # most entries there can be used, so they are not copied
        target = self._oldest_free()
        if common and target != source:
            self._backend.copy(source, target, common)
        return target, common

    def start_decoding(self, sequence: DecodingSequence) -> None:
        """A sequence's prompt is read: it decodes from now on."""
        place = self.place(sequence)
        assert place is not None
        self._swap(place, self.num_decoding)
        self.num_decoding += 1

    def release(self, sequence: DecodingSequence, *, keep: bool = True) -> None:
        """Free a sequence's slot, if it has one.

        Args:
            sequence: whose slot.
            keep: whether later prompts may start from its entries. They may not after an error: the entries may be wrong.
        """
        if (place := self.place(sequence)) is None:
            return
        slot = self._slots[place]
        slot.sequence, slot.last_used = None, next(self._clock)
        if not (keep and self._reuse_prefixes):
            slot.tokens, slot.length = None, 0
        if place < self.num_decoding:
            self.num_decoding -= 1
            self._swap(place, self.num_decoding)

    def reserve(self, first: int, count: int, new_tokens: int) -> None:
        """Make room in some neighbouring slots for new entries after the valid ones.

        Args:
            first: the first of the slots.
            count: how many slots.
            new_tokens: entries that a step will write to each.

        Raises:
            CapacityError: there is no memory for them.
        """
        slots = self._slots[first : first + count]
        self._fit(max(slot.length for slot in slots) + new_tokens)
        for slot in slots:
            slot.written = max(slot.written, slot.length + new_tokens)

    def _fit(self, needed: int, num_more: int = 0) -> None:
        """Make the cache large enough, or smaller if it has long been far too large.

        Args:
            needed: entries a slot.
            num_more: sequences that are about to get a slot.
        """
        if self._fixed:
            if self._backend.num_slots < self.num_slots or self._backend.capacity < self._fixed:
                self._resize(self.num_slots, self._fixed)
            return
        needed = max([needed, *(slot.needed for slot in self._slots)])
        capacity = self._backend.capacity
        if capacity < max(SHRINK * needed, MIN_CAPACITY):
            self._num_small = 0
        num_wanted = len(self.active) + num_more
        if needed > capacity or self._backend.num_slots < max(num_wanted, len(self._slots)):
            self._num_small = 0
            self._grow(needed, num_wanted)
        elif self._num_small >= PATIENCE:
            self._num_small = 0
            try:
                self._resize(len(self._slots), needed)
            except CapacityError as error:  # there was room in the cache as it is, so it stays
                log.info("the cache of %d times %d entries was not made smaller: %s", len(self._slots), capacity, error)

    def _grow(self, needed: int, num_wanted: int) -> None:
        """Grow the cache. If the memory does not suffice, do without free slots, and then without entries nobody needs."""
        most, fewest = self._num_slots, max(num_wanted, 1)
        largest = max(needed, self._backend.capacity)
        *before, last = dict.fromkeys([(most, largest), (fewest, largest), (fewest, needed)])
        for num_slots, capacity in before:
            with contextlib.suppress(CapacityError):
                self._shape(num_slots, capacity)
                return
        self._shape(*last)

    def _shape(self, num_slots: int, capacity: int) -> None:
        """Change the cache's size. If there will be fewer slots, sequences move to the first ones."""
        if num_slots < len(self._slots):
            self._pack()
        self._resize(num_slots, capacity)

    def _pack(self) -> None:
        """Move the sequences whose prompts are being read up to those that decode, so that the last slots are free."""
        for place in range(self.num_decoding, len(self._slots)):
            if self._slots[place].sequence is None:
                later = range(place + 1, len(self._slots))
                source = next((other for other in later if self._slots[other].sequence is not None), None)
                if source is None:
                    return
                self._swap(place, source)

    def _resize(self, num_slots: int, capacity: int) -> None:
        """Change the cache's size; on an error nothing has changed."""
        needed = self._entry_bytes * num_slots * (self._fixed or bucket(capacity))
        if self._max_bytes is not None and needed > self._max_bytes:
            raise CapacityError(
                f"a cache of {num_slots} times {self._fixed or bucket(capacity)} entries takes {needed} bytes, "
                f"max_cache_bytes is {self._max_bytes}"
            )
        kept = [min(slot.length, capacity) for slot in self._slots[: min(num_slots, self._backend.num_slots)]]
        self._backend.resize(num_slots, capacity, kept)
        del self._slots[num_slots:]
        self._slots += [Slot() for _ in range(num_slots - len(self._slots))]
        for slot in self._slots:
            slot.length = slot.written = min(slot.length, capacity)

    def _longest_prefix(self, sequence: DecodingSequence) -> tuple[int, int]:
        """The slot with the longest cached beginning of a sequence, and its length. At least one token is left to be read."""
        if not self._reuse_prefixes or sequence.is_scored:
            return 0, 0
        most = sequence.num_to_read - 1
        lengths = [
            0 if slot.tokens is None else min(slot.tokens.num_common(sequence.tokens), slot.length, most)
            for slot in self._slots
        ]
        longest = max(lengths)
        return lengths.index(longest), longest

    def _oldest_free(self) -> int:
        free = [place for place, slot in enumerate(self._slots) if slot.sequence is None]
        return min(free, key=lambda place: (bool(self._slots[place].length), self._slots[place].last_used))

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        one, other = self._slots[a], self._slots[b]
        if one.length and other.length:
            self._backend.swap(a, b, max(one.length, other.length))
        elif one.length:
            self._backend.copy(a, b, one.length)
        elif other.length:
            self._backend.copy(b, a, other.length)
        one.written = other.written = max(one.written, other.written)
        self._slots[a], self._slots[b] = other, one
