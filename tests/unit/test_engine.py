"""The decoding loop, against a model whose every choice depends on all it sees."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime import CandidateTree, CapacityError, DecodingEngine, DecodingOptions, DecodingStats, OptionError, TreeError
from tests.support import fake_backend
from tests.support.fake_backend import FakeBackend, fake_manifest, greedy

PROMPT = [3, 1, 4, 1, 5]


def run(backend: FakeBackend, prompts: list[list[int]], num_tokens: int, **options) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    for steps in DecodingEngine(backend).generate(prompts, num_tokens, **options):
        for step in steps:
            answers[step.sequence] += step.token_ids
    return answers


@pytest.mark.parametrize("skill", ["never", "always", "sometimes"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 40])
def test_medusa_gives_what_greedy_decoding_gives(skill, num_tokens) -> None:
    assert run(FakeBackend(skill), [PROMPT], num_tokens) == [greedy(PROMPT, num_tokens)]


def test_plain_decoding_verifies_one_token_a_step() -> None:
    backend = FakeBackend("always")
    assert run(backend, [PROMPT], 9, medusa=False) == [greedy(PROMPT, 9)]
    assert backend.steps == [(1, len(PROMPT)), *[(1, 1)] * 8]


def test_heads_that_are_always_right_give_a_token_for_each_depth_and_one_more() -> None:
    stats = DecodingStats()
    chain = CandidateTree.from_parents([-1, 0, 1, 2])
    run(FakeBackend("always"), [PROMPT], 1 + 4 * 5, tree=chain, stats=stats)
    assert (stats.num_steps, stats.tokens_per_step, stats.num_accepted_tokens) == (5, 4.0, 15)


def test_heads_that_are_never_right_give_one_token_a_step() -> None:
    stats = DecodingStats()
    run(FakeBackend("never"), [PROMPT], 12, stats=stats)
    assert (stats.num_steps, stats.tokens_per_step, stats.num_accepted_tokens) == (11, 1.0, 0)
    assert stats.num_draft_tokens > 0


trees = st.recursive(st.just([]), lambda children: st.lists(children, max_size=3), max_leaves=8)


def tree_of(shape: list, depth: int = 0) -> list[list[int]]:
    return [path for rank, child in enumerate(shape) for path in ([rank], *([rank, *rest] for rest in tree_of(child)))]


@settings(max_examples=60, deadline=None)
@given(
    shape=trees,
    prompts=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=30), min_size=1, max_size=4),
    num_tokens=st.integers(1, 25),
    chunk=st.integers(1, 12),
    skill=st.sampled_from(["never", "always", "sometimes"]),
)
def test_any_tree_any_batch_any_prefill_chunk(shape, prompts, num_tokens, chunk, skill) -> None:
    tree = CandidateTree.from_choices(tree_of(shape))
    manifest = fake_manifest(num_heads=max(tree.depth, 1), top_k=max(tree.top_k, 4), tree=tree, max_prefill_tokens=chunk)
    answers = run(FakeBackend(skill, manifest), prompts, num_tokens)
    assert answers == [greedy(prompt, num_tokens) for prompt in prompts]


def test_the_answer_ends_with_an_end_of_sequence_token_even_inside_accepted_drafts() -> None:
    expected = greedy(PROMPT, 30)
    eos = expected[6]
    cut = expected[: expected.index(eos) + 1]
    for skill in ("never", "always"):
        steps = [s for [s] in DecodingEngine(FakeBackend(skill)).generate([PROMPT], 30, stop_token_ids=[eos])]
        assert [token for step in steps for token in step.token_ids] == cut
        assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + ["stop"]


def test_a_finished_sequence_does_not_disturb_the_others() -> None:
    prompts = [[1, 2], [7] * 9, [30, 31, 32]]
    expected = [greedy(prompt, 20) for prompt in prompts]
    eos = expected[0][2]
    answers = run(FakeBackend("sometimes"), prompts, 20, stop_token_ids=[eos])
    for answer, whole in zip(answers, expected, strict=True):
        assert answer == (whole[: whole.index(eos) + 1] if eos in whole else whole)


def test_the_last_step_verifies_no_deeper_than_what_may_still_be_given() -> None:
    backend = FakeBackend("never")
    run(backend, [PROMPT], 3)
    assert backend.steps[-1] == (1, 1)  # one token left: the bonus token is enough


def test_a_request_that_fills_the_limit_exactly_is_served() -> None:
    backend = FakeBackend("always", fake_manifest(max_seq_len=20))
    assert run(backend, [PROMPT], 15) == [greedy(PROMPT, 15)]


@pytest.mark.parametrize(
    ("prompts", "num_tokens", "error", "message"),
    [
        ([PROMPT], 16, CapacityError, "5 tokens and 16 new ones"),
        ([PROMPT], -1, OptionError, "max_new_tokens is -1"),
        ([[]], 5, OptionError, "empty"),
        ([], 5, OptionError, "no prompt"),
        ([[50]], 5, OptionError, "outside the vocabulary of 50"),
        ([[-1]], 5, OptionError, "outside the vocabulary of 50"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_before_any_work(prompts, num_tokens, error, message) -> None:
    backend = FakeBackend(manifest=fake_manifest(max_seq_len=20))
    with pytest.raises(error, match=message):
        DecodingEngine(backend).generate(prompts, num_tokens)
    assert backend.steps == []


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ([[0, 0, 0, 0]], TreeError, "4 deep, the bundle has 3 heads"),
        ([[4]], TreeError, "best 5 tokens of a head, the bundle's heads give 4"),
        ([[0], [1], [2], [3]], CapacityError, "5 nodes, the engine takes 4"),
    ],
)
def test_a_tree_that_the_bundle_cannot_verify_is_refused(choices, error, message) -> None:
    backend = FakeBackend(manifest=fake_manifest(max_tree_nodes=4, tree=CandidateTree.root_only()))
    with pytest.raises(error, match=message):
        DecodingEngine(backend, CandidateTree.from_choices(choices))


def test_two_answers_read_in_turn_do_not_disturb_each_other() -> None:
    engine = DecodingEngine(FakeBackend("sometimes"))
    streams = [engine.generate([PROMPT], 20), engine.generate([[9, 9]], 20)]
    answers: list[list[int]] = [[], []]
    while len(answers[0]) < 20 or len(answers[1]) < 20:
        for answer, stream in zip(answers, streams, strict=True):
            for steps in itertools.islice(stream, 1):
                answer += [token for step in steps for token in step.token_ids]
    assert answers == [greedy(PROMPT, 20), greedy([9, 9], 20)]


def test_statistics_add_up() -> None:
    stats = DecodingStats()
    answers = run(FakeBackend("sometimes"), [PROMPT, [9, 9]], 17, stats=stats)
    assert stats.num_prompt_tokens == 7
    assert stats.num_generated_tokens == sum(map(len, answers)) == 34
    assert stats.num_decoded_tokens == 32
    assert stats.num_accepted_tokens <= stats.num_draft_tokens
    assert 0 <= stats.engine_seconds <= stats.decode_seconds
    assert np.isclose(stats.tokens_per_step, 32 / stats.num_steps)


def test_tokens_that_are_taken_back_count_nowhere() -> None:
    """A stop text may end inside a step: what came after it was not given out."""
    prompt = [7, 8, 9] * 6
    with patch.object(fake_backend, "next_token", lambda context: {7: 8, 8: 9, 9: 7}[context[-1]]):
        engine = DecodingEngine(FakeBackend("never"), prompt_lookup=True)
        sequence = engine.add(prompt, DecodingOptions(max_new_tokens=50))
        while sequence.stats.num_looked_up_tokens < 3:
            before = sequence.num_tokens
            engine.step()
        engine.end(sequence, "stop", num_unused=sequence.num_tokens - before - 1)
    for stats in (sequence.stats, engine.stats):
        assert stats.num_generated_tokens == len(sequence.token_ids) == before + 1
        assert stats.num_looked_up_tokens == stats.num_accepted_tokens == sum(stats.accepted_by_depth) == 1
