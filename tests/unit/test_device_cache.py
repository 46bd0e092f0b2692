"""The cache on a GPU, moved about by the stand-in of the driver, beside the same moves in NumPy."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime.backends.gpu.cache import SWAP_ENTRIES, DeviceCache
from medusa_runtime.backends.gpu.driver import Gpu
from medusa_runtime.errors import CapacityError
from tests.support.caches import UNEQUAL, layout_of
from tests.support.stand_in_cuda import StandInDriver

LAYERS, HEADS, WIDTH, SLOTS, CAPACITY = 2, 3, 4, 3, 160
EQUAL = {f"{layer}.{part}": (HEADS, WIDTH) for layer in range(LAYERS) for part in ("key", "value")}


class Both:
    """A cache on the stand-in, and what each of its tensors must hold, [slots, H, S, D]."""

    def __init__(
        self,
        tensors: Mapping[str, tuple[int, int]] = EQUAL,
        slots: int = SLOTS,
        capacity: int = CAPACITY,
        memory: int = 1 << 24,
    ) -> None:
        self.driver = StandInDriver(memory=memory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "cuda.bindings.driver", self.driver)
            self.gpu = Gpu()
        self.layout = layout_of(tensors, dict.fromkeys(tensors, "float16"))
        self.cache = DeviceCache(self.gpu, self.layout, slots, capacity)
        self.gpu.synchronize()
        random, self.wanted = np.random.default_rng(0), {}
        for tensor, raw in zip(self.layout.tensors, self.raw(self.cache).values(), strict=True):
            raw[:] = self.wanted[tensor.name] = random.integers(0, 9999, raw.shape).astype(np.int16)

    def raw(self, cache: DeviceCache) -> dict[str, np.ndarray]:
        """The memory of each tensor on the stand-in, by name and in the layout's order."""
        found = {}
        for tensor, memory in cache.tensors(0, cache.num_slots):
            size = 2 * math.prod(memory.shape)
            found[tensor.name] = self.driver.room(memory.address, size, on_device=True).view(np.int16).reshape(memory.shape)
        return {tensor.name: found[tensor.name] for tensor in self.layout.tensors}

    def check(self) -> None:
        self.gpu.synchronize()
        for name, found in self.raw(self.cache).items():
            np.testing.assert_array_equal(found, self.wanted[name])


either = pytest.mark.parametrize("tensors", [EQUAL, UNEQUAL], ids=["equal", "unequal"])


@either
def test_a_new_cache_is_zero_and_its_tensors_are_where_they_are_said_to_be(tensors: Mapping[str, tuple[int, int]]) -> None:
    both = Both(tensors)
    fresh = DeviceCache(both.gpu, both.layout, SLOTS, CAPACITY)
    both.gpu.synchronize()
    assert not any(raw.any() for raw in both.raw(fresh).values())
    both.check()  # no tensor lies on another one
    whole = {tensor.name: memory for tensor, memory in both.cache.tensors(0, SLOTS)}
    for tensor, memory in both.cache.tensors(2, 1):
        assert memory.shape == tensor.shape(1, CAPACITY)
        assert memory.address == whole[tensor.name].address + 2 * CAPACITY * tensor.entry_bytes
        assert whole[tensor.name].address % 256 == 0


@either
@settings(max_examples=20, deadline=None)
@given(st.integers(0, SLOTS - 1), st.integers(0, 40), st.sets(st.integers(1, 40), max_size=12))
def test_entries_of_accepted_nodes_move_to_the_front(
    tensors: Mapping[str, tuple[int, int]], slot: int, start: int, later: set[int]
) -> None:
    both, nodes = Both(tensors), np.array([0, *sorted(later)])
    for wanted in both.wanted.values():
        wanted[slot, :, start : start + len(nodes)] = wanted[slot][:, start + nodes]
    both.cache.move(slot, start, nodes)
    both.check()


def test_what_stands_in_place_is_not_touched() -> None:
    both = Both()
    both.driver.take_calls()
    both.cache.move(1, 7, np.arange(5))
    assert both.driver.take_calls() == []


@either
@pytest.mark.parametrize("length", [0, 1, SWAP_ENTRIES, SWAP_ENTRIES + 3, CAPACITY])
def test_slots_are_copied_and_exchanged_as_far_as_they_are_filled(tensors: Mapping[str, tuple[int, int]], length: int) -> None:
    both = Both(tensors)
    for wanted in both.wanted.values():
        wanted[2, :, :length] = wanted[0, :, :length]
    both.cache.copy(0, 2, length)
    both.check()
    for wanted in both.wanted.values():
        wanted[[0, 1], :, :length] = wanted[[1, 0], :, :length]
    both.cache.swap(0, 1, length)
    both.check()


@either
@pytest.mark.parametrize("slots", [1, SLOTS])
def test_entries_are_cleared(tensors: Mapping[str, tuple[int, int]], slots: int) -> None:
    both = Both(tensors, slots)
    for wanted in both.wanted.values():
        wanted[slots - 1, :, 3:50] = 0
    both.cache.clear(slots - 1, 3, 50)
    both.cache.clear(0, 60, 60)
    both.check()


@either
def test_another_cache_takes_over_what_is_kept(tensors: Mapping[str, tuple[int, int]]) -> None:
    both = Both(tensors)
    larger = DeviceCache(both.gpu, both.layout, SLOTS + 1, CAPACITY + 64)
    larger.take(both.cache, [5, 0, CAPACITY])
    both.gpu.synchronize()
    for name, found in both.raw(larger).items():
        wanted = np.zeros_like(found)
        wanted[0, :, :5] = both.wanted[name][0, :, :5]
        wanted[2, :, :CAPACITY] = both.wanted[name][2]
        np.testing.assert_array_equal(found, wanted)


def test_too_little_memory_is_told_with_both_numbers() -> None:
    with pytest.raises(
        CapacityError,
        match=r"^a cache of 3 times 160 entries needs 46.1 KB of GPU memory, 10.0 KB are free on Stand-in GPU; lower max_b",
    ):
        Both(memory=10_000)


def test_memory_goes_back_when_nobody_holds_it() -> None:
    both = Both()
    used = both.driver.used()
    spare = DeviceCache(both.gpu, both.layout, 1, 64)
    assert both.driver.used() > used
    del spare
    assert both.driver.used() == used
