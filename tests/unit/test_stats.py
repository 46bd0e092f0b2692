"""Counts of decoding: whatever steps are counted and taken back, they agree with each other."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given

from medusa_runtime import DecodingEngine, DecodingOptions
from medusa_runtime.decoding.stats import DecodingStats, StepCounts
from medusa_runtime.drafting.draft import Draft
from tests.support import fake_backend
from tests.support.fake_backend import FakeBackend, fake_manifest, repeating_token
from tests.support.steps import steps_and_cuts
from tests.unit.test_service import service


def check_agreement(stats: DecodingStats) -> None:
    """What must hold of all counts together."""
    assert sum(stats.steps_by_accepted) == sum(stats.steps_by_drafted) == stats.num_steps
    assert sum(count * steps for count, steps in enumerate(stats.steps_by_accepted)) == stats.num_accepted_tokens
    assert sum(count * steps for count, steps in enumerate(stats.steps_by_drafted)) == stats.num_draft_tokens
    assert sum(stats.drafted_by_depth) == stats.num_draft_tokens
    assert sum(stats.accepted_by_depth) == stats.num_accepted_tokens
    assert sum(stats.accepted_by_lookup) == stats.num_looked_up_tokens
    for drafted, accepted in (
        (stats.drafted_by_depth, stats.accepted_by_depth),
        (stats.drafted_by_head, stats.accepted_by_head),
        (stats.drafted_by_lookup, stats.accepted_by_lookup),
        (stats.drafted_by_guide, stats.accepted_by_guide),
    ):
        assert all(0 <= b <= a for a, b in itertools.zip_longest(drafted, accepted, fillvalue=0))


@given(steps_and_cuts())
def test_counts_agree_after_any_steps_and_cuts(run) -> None:
    counted, kept = DecodingStats(), DecodingStats()
    for step, num_unused in run:
        counted.count_step(step)
        if num_unused:
            counted.take_back(step, num_unused)
        kept.count_step(step.without_last(num_unused))
        check_agreement(counted)
    assert counted.num_accepted_tokens == kept.num_accepted_tokens
    assert counted.num_generated_tokens == counted.num_decoded_tokens == kept.num_decoded_tokens
    assert counted.accepted_by_head == kept.accepted_by_head


def test_a_step_is_counted_by_depth_and_by_who_named_the_drafts() -> None:
    looked_up = np.array([False, True, False, True, False, False])
    tree = Draft(np.arange(6), np.array([-1, 0, 0, 1, 1, 3]), np.array([0, 1, 1, 2, 2, 3]), np.zeros(6, np.float32), looked_up)
    stats = DecodingStats()
    stats.count_step(StepCounts.of(tree, [1, 4], 3))  # two drafts are accepted: one looked up, one a head's
    stats.count_step(StepCounts.of(Draft.chain([7, 8, 9]), [1, 2], 2, is_forced=True))
    stats.count_step(StepCounts.of(Draft.chain([7]), [], 1))
    assert (stats.drafted_by_depth, stats.accepted_by_depth) == ([3, 3, 1], [2, 2, 0])
    assert (stats.drafted_by_lookup, stats.accepted_by_lookup) == ([1, 1], [1, 0])
    assert (stats.drafted_by_guide, stats.accepted_by_guide) == ([1, 1], [1, 1])
    assert (stats.drafted_by_head, stats.accepted_by_head) == ([1, 1, 1], [0, 1, 0])
    assert (stats.steps_by_drafted, stats.steps_by_accepted) == ([1, 0, 1, 0, 0, 1], [1, 0, 2])
    assert (stats.num_looked_up_tokens, stats.num_decoded_tokens) == (1, 6)
    check_agreement(stats)


@pytest.mark.parametrize("lookup", [False, True])
def test_the_engine_counts_what_it_did(lookup: bool) -> None:
    backend, stats = FakeBackend("sometimes", fake_manifest(max_seq_len=300)), DecodingStats()
    with patch.object(fake_backend, "next_token", repeating_token):
        engine = DecodingEngine(backend, prompt_lookup=lookup)
        list(engine.generate([[1, 2, 3], [4, 5]], 60, stats=stats))
    check_agreement(engine.stats)
    check_agreement(stats)
    assert engine.stats.num_passes == stats.num_passes == len(backend.steps) - 1  # one read the prompts
    assert stats.num_passes < stats.num_steps  # most passes verified both
    assert (sum(stats.accepted_by_lookup) > 0) == lookup
    assert sum(stats.accepted_by_head) > 0


def test_nothing_is_counted_before_anything_was_done() -> None:
    assert not any(vars(DecodingStats()).values())


def test_rates_are_by_step_and_by_second() -> None:
    stats = DecodingStats(
        num_steps=4,
        num_decoded_tokens=10,
        accepted_by_depth=[3, 2, 1],
        decode_seconds=5.0,
        queue_seconds=1.0,
        prefill_seconds=2.0,
    )
    assert stats.acceptance_by_depth == [0.75, 0.5, 0.25]
    assert (stats.tokens_per_step, stats.tokens_per_second, stats.seconds_per_token) == (2.5, 2.0, 0.5)
    assert stats.first_token_seconds == 3.0
    nothing = DecodingStats(accepted_by_depth=[3])
    assert (nothing.acceptance_by_depth, nothing.tokens_per_step, nothing.tokens_per_second) == ([], 0.0, 0.0)


def test_counts_agree_after_a_stop_text_inside_a_step() -> None:
    with service(backend=FakeBackend("always", fake_manifest(max_seq_len=300))) as lm:
        whole = lm.generate("abc", max_new_tokens=40)
        cut = lm.generate("abc", max_new_tokens=40, stop=whole.text[9])
        check_agreement(lm.stats().decoding)
    check_agreement(cut.stats)
    assert cut.stats.num_generated_tokens == len(cut.token_ids) <= 10


def test_the_cache_is_used_while_answers_are_decoded() -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=300))
    engine = DecodingEngine(backend, max_batch_size=4)
    before = engine.cache
    sequence = engine.add([1, 2, 3], DecodingOptions(max_new_tokens=5))
    for _ in range(3):
        engine.step()
    during = engine.cache
    engine.end(sequence)
    assert (before.num_entries, before.max_entries, before.num_bytes) == (0, 1200, 0)
    assert during.num_entries == 3 + sequence.num_tokens - 1  # the last token is not cached yet
    assert during.num_bytes > 0
    assert engine.cache.num_entries == 0  # what is left for prefix reuse can be given up at any time


def test_a_memory_limit_is_the_most_that_the_cache_can_hold() -> None:
    engine = DecodingEngine(FakeBackend(), max_batch_size=4, max_cache_bytes=64 * 100)
    assert engine.cache.max_entries == 100  # of 64 bytes each


class OneWay:
    """A guide that says which token must follow every odd token of an answer."""

    def __init__(self, answer: list[int]) -> None:
        self.left = answer

    def advance(self, token_ids) -> None:
        self.left = self.left[len(token_ids) :]

    def allowed(self, path):
        return np.ones(fake_backend.VOCAB_SIZE, bool)

    def lets_pass(self, path) -> bool:
        return True

    def forced(self) -> list[int]:
        return self.left[:2] if len(self.left) % 2 else []


def test_drafts_that_a_guide_forced_are_no_heads() -> None:
    engine = DecodingEngine(FakeBackend("never"))
    engine.add([1, 2], DecodingOptions(max_new_tokens=12), guide=OneWay(fake_backend.greedy([1, 2], 12)))
    while not engine.is_idle:
        engine.step()
    check_agreement(engine.stats)
    assert sum(engine.stats.accepted_by_guide) > 0
    assert sum(engine.stats.accepted_by_head) == 0 < sum(engine.stats.drafted_by_head)
