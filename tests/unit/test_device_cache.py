"""The cache on a GPU, moved about by the stand-in of the driver, beside the same moves in NumPy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime.backends.gpu.cache import SWAP_ENTRIES, DeviceCache
from medusa_runtime.backends.gpu.driver import Gpu
from medusa_runtime.bundle.manifest import ModelFacts
from medusa_runtime.errors import CapacityError
from tests.support.stand_in_cuda import StandInDriver

LAYERS, HEADS, WIDTH, SLOTS, CAPACITY = 2, 3, 4, 3, 160
MODEL = ModelFacts(
    name="m", architecture="A", vocab_size=9, hidden_size=8, num_layers=LAYERS, num_attention_heads=3, num_kv_heads=HEADS,
    head_dim=WIDTH, eos_token_ids=[],
)  # fmt: skip


class Both:
    """A cache on the stand-in, and what it must hold."""

    def __init__(self, slots: int = SLOTS, capacity: int = CAPACITY, memory: int = 1 << 24) -> None:
        self.driver = StandInDriver(memory=memory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "cuda.bindings.driver", self.driver)
            self.gpu = Gpu()
        self.cache = DeviceCache(self.gpu, MODEL, 2, slots, capacity)
        self.gpu.synchronize()
        self.wanted = np.random.default_rng(0).integers(0, 9999, (2 * LAYERS, slots, HEADS, capacity, WIDTH)).astype(np.int16)
        self.raw()[:] = self.wanted.reshape(-1)

    def raw(self) -> np.ndarray:
        return self.driver.room(self.cache.address(0, 0, 0), self.cache.num_bytes, on_device=True).view(np.int16)

    def check(self) -> None:
        self.gpu.synchronize()
        np.testing.assert_array_equal(self.raw().reshape(self.wanted.shape), self.wanted)


def test_a_new_cache_is_zero_and_its_tensors_are_where_they_are_said_to_be() -> None:
    both = Both()
    fresh = DeviceCache(both.gpu, MODEL, 2, SLOTS, CAPACITY)
    both.gpu.synchronize()
    assert not both.driver.room(fresh.address(0, 0, 0), fresh.num_bytes, on_device=True).any()
    values = both.driver.room(both.cache.address(1, 1, 2), HEADS * CAPACITY * WIDTH * 2, on_device=True).view(np.int16)
    np.testing.assert_array_equal(values, both.wanted[3, 2].reshape(-1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, SLOTS - 1), st.integers(0, 40), st.sets(st.integers(1, 40), max_size=12))
def test_entries_of_accepted_nodes_move_to_the_front(slot: int, start: int, later: set[int]) -> None:
    both, nodes = Both(), np.array([0, *sorted(later)])
    entries = both.wanted[:, slot]  # [2L, Hkv, S, D]
    entries[:, :, start : start + len(nodes)] = entries[:, :, start + nodes]
    both.cache.move(slot, start, nodes)
    both.check()


def test_what_stands_in_place_is_not_touched() -> None:
    both = Both()
    both.driver.take_calls()
    both.cache.move(1, 7, np.arange(5))
    assert both.driver.take_calls() == []


@pytest.mark.parametrize("length", [0, 1, SWAP_ENTRIES, SWAP_ENTRIES + 3, CAPACITY])
def test_slots_are_copied_and_exchanged_as_far_as_they_are_filled(length: int) -> None:
    both = Both()
    both.wanted[:, 2, :, :length] = both.wanted[:, 0, :, :length]
    both.cache.copy(0, 2, length)
    both.check()
    both.wanted[:, [0, 1], :, :length] = both.wanted[:, [1, 0], :, :length]
    both.cache.swap(0, 1, length)
    both.check()


@pytest.mark.parametrize("slots", [1, SLOTS])
def test_entries_are_cleared(slots: int) -> None:
    both = Both(slots)
    both.wanted[:, slots - 1, :, 3:50] = 0
    both.cache.clear(slots - 1, 3, 50)
    both.cache.clear(0, 60, 60)
    both.check()


def test_another_cache_takes_over_what_is_kept() -> None:
    both = Both()
    larger = DeviceCache(both.gpu, MODEL, 2, SLOTS + 1, CAPACITY + 64)
    larger.take(both.cache, [5, 0, CAPACITY])
    both.gpu.synchronize()
    found = both.driver.room(larger.address(0, 0, 0), larger.num_bytes, on_device=True).view(np.int16)
    found = found.reshape(2 * LAYERS, SLOTS + 1, HEADS, CAPACITY + 64, WIDTH)
    wanted = np.zeros_like(found)
    wanted[:, 0, :, :5] = both.wanted[:, 0, :, :5]
    wanted[:, 2, :, :CAPACITY] = both.wanted[:, 2]
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
    spare = DeviceCache(both.gpu, MODEL, 2, 1, 64)
    assert both.driver.used() > used
    del spare
    assert both.driver.used() == used
