"""Caches that memory or `max_cache_bytes` keeps small, and devices that fail beside a step."""

from __future__ import annotations

import random

import pytest

from medusa_runtime import CapacityError, DecodingEngine
from medusa_runtime.backends.base import bucket, cache_entry_bytes
from medusa_runtime.drafting.costs import StepCosts
from medusa_runtime.options import DecodingOptions
from tests.support.fake_backend import FakeBackend, fake_manifest, greedy

MANIFEST = fake_manifest(max_seq_len=2000)
PASSES_ARE_DEAR = StepCosts([1, 8], [1, 512], [64], [[[10.0, 10.1], [10.0, 10.1]]], [0.1, 0.1])


class BucketBackend(FakeBackend):
    """Rounds capacities up as a real backend does."""

    def resize(self, num_slots, capacity, lengths=()):
        super().resize(num_slots, bucket(capacity), lengths)


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(50) for _ in range(length)]


def engine_with_entries(num_entries: int, **settings) -> DecodingEngine:
    """An engine whose cache may have so many entries, all slots together."""
    most = num_entries * cache_entry_bytes(MANIFEST)
    return DecodingEngine(BucketBackend("never", MANIFEST), max_cache_bytes=most, **settings)


def finish(engine: DecodingEngine) -> None:
    while not engine.is_idle:
        engine.step()


@pytest.mark.parametrize("max_batch_size", [2, 4])
def test_prompts_are_not_read_together_if_only_their_padding_does_not_fit(max_batch_size) -> None:
    engine = engine_with_entries(2 * 576, max_batch_size=max_batch_size)
    engine._reader.costs = PASSES_ARE_DEAR
    prompts = [prompt_of(576, seed=1), prompt_of(80, seed=2)]  # 512 are read of the first: 512 + 80 entries are too many
    long = engine.add(prompts[0], DecodingOptions(max_new_tokens=1))
    engine.step()
    short = engine.add(prompts[1], DecodingOptions(max_new_tokens=4))
    finish(engine)
    assert (long.error, short.error) == (None, None)
    assert (long.token_ids, short.token_ids) == (greedy(prompts[0], 1), greedy(prompts[1], 4))


def test_after_a_long_sequence_short_ones_share_the_memory() -> None:
    engine = engine_with_entries(1024, max_batch_size=4)
    engine.add(prompt_of(1000, seed=0), DecodingOptions(max_new_tokens=5))
    finish(engine)  # the whole memory is one slot now
    prompts = [prompt_of(280, seed) for seed in range(1, 7)]
    sequences = [engine.add(prompt, DecodingOptions(max_new_tokens=20)) for prompt in prompts]
    engine.step()
    assert engine.num_active == 3  # 3 times 320 entries
    finish(engine)
    assert [sequence.token_ids for sequence in sequences] == [greedy(prompt, 20) for prompt in prompts]


def test_a_sequence_that_no_memory_is_enough_for_ends_alone() -> None:
    engine = engine_with_entries(256, max_batch_size=3)
    large, small = prompt_of(300, seed=1), prompt_of(30, seed=2)
    sequences = [engine.add(prompt, DecodingOptions(max_new_tokens=5)) for prompt in (large, small)]
    finish(engine)
    assert isinstance(sequences[0].error, CapacityError)
    assert sequences[1].token_ids == greedy(small, 5)


@pytest.mark.parametrize("call", ["propose", "clear"])
def test_a_device_that_fails_beside_a_step_ends_one_sequence_and_no_other(call, monkeypatch) -> None:
    backend = FakeBackend("sometimes")
    engine = DecodingEngine(backend, max_batch_size=2)
    working, calls = getattr(backend, call), []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("the device is gone")
        return working(*arguments)

    monkeypatch.setattr(backend, call, fail_once)
    first = engine.add([1, 2, 3], DecodingOptions(max_new_tokens=9))
    engine.step()
    second = engine.add([4, 5], DecodingOptions(max_new_tokens=9))
    finish(engine)
    assert (first.finish_reason, str(first.error)) == ("error", "the device is gone")
    assert (second.finish_reason, second.token_ids) == ("length", greedy([4, 5], 9))
