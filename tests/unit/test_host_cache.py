"""The cache in the host's memory: entries move alike in tensors of all shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime.backends.host_cache import HostCache
from medusa_runtime.errors import CapacityError
from tests.support.caches import UNEQUAL, layout_of

SLOTS, CAPACITY = 3, 64


class Both:
    """A cache of unequal tensors, and what each of them must hold."""

    def __init__(self, slots: int = SLOTS, capacity: int = CAPACITY) -> None:
        self.cache = HostCache(layout_of(UNEQUAL), slots, capacity)
        random = np.random.default_rng(0)
        self.wanted = {tensor.name: random.normal(size=array.shape) for tensor, array in self.cache.tensors(0, slots)}
        for tensor, array in self.cache.tensors(0, slots):
            array[:] = self.wanted[tensor.name] = self.wanted[tensor.name].astype(array.dtype)

    def check(self) -> None:
        for tensor, array in self.cache.tensors(0, self.cache.num_slots):
            np.testing.assert_array_equal(array, self.wanted[tensor.name])


def test_a_tensor_of_some_slots_is_contiguous_and_has_its_own_shape() -> None:
    both = Both()
    for tensor, array in both.cache.tensors(1, 2):
        heads, width = UNEQUAL[tensor.name]
        assert (array.shape, array.flags.c_contiguous) == ((2, heads, CAPACITY, width), True)
        np.testing.assert_array_equal(array, both.wanted[tensor.name][1:])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, SLOTS - 1), st.integers(0, 20), st.sets(st.integers(1, 30), max_size=12))
def test_entries_of_accepted_nodes_move_to_the_front(slot: int, start: int, later: set[int]) -> None:
    both, nodes = Both(), np.array([0, *sorted(later)])
    for wanted in both.wanted.values():
        wanted[slot, :, start : start + len(nodes)] = wanted[slot][:, start + nodes]
    both.cache.move(slot, start, nodes)
    both.check()


def test_slots_are_copied_exchanged_and_cleared_as_far_as_they_are_filled() -> None:
    both = Both()
    for wanted in both.wanted.values():
        wanted[2, :, :9] = wanted[0, :, :9]
        wanted[[0, 1], :, :5] = wanted[[1, 0], :, :5]
        wanted[1, :, 3:20] = 0
    both.cache.copy(0, 2, 9)
    both.cache.swap(0, 1, 5)
    both.cache.clear(1, 3, 20)
    both.check()


def test_a_larger_cache_takes_over_what_is_kept_and_is_zero_elsewhere() -> None:
    both = Both()
    larger = HostCache(both.cache.layout, SLOTS + 1, 2 * CAPACITY)
    larger.take(both.cache, [5, 0, CAPACITY])
    for tensor, array in larger.tensors(0, SLOTS + 1):
        wanted = np.zeros_like(array)
        wanted[0, :, :5] = both.wanted[tensor.name][0, :, :5]
        wanted[2, :, :CAPACITY] = both.wanted[tensor.name][2]
        np.testing.assert_array_equal(array, wanted)


def test_too_little_memory_is_told() -> None:
    with pytest.raises(CapacityError, match=r"^no memory for a cache of 1 times \d+ entries$"):
        HostCache(layout_of(UNEQUAL), 1, 1 << 56)
