"""Continuous batching, against a model whose every choice depends on all it sees: who is beside whom changes no token."""

from __future__ import annotations

import random
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime import CandidateTree, CapacityError, DecodingEngine, DecodingOptions, DynamicTree, OptionError, StepCosts
from medusa_runtime.decoding.sequence import DecodingSequence
from medusa_runtime.drafting.costs import LearnedCosts
from medusa_runtime.drafting.proposals import HeadGuesses, candidates_for
from tests.support import fake_backend
from tests.support.fake_backend import FakeBackend, fake_manifest, greedy

TREES = [None, CandidateTree.root_only(), CandidateTree.from_choices([[0, 0, 0], [1], [2, 1]]), DynamicTree(3), DynamicTree(9)]
COSTS = StepCosts([1, 8], [1, 4, 16], [64], [[[1.0, 1.1, 1.6], [1.5, 3.0, 9.0]]], [0.1, 0.3])


def random_options(rng: random.Random) -> DecodingOptions:
    return DecodingOptions(
        max_new_tokens=rng.choice([1, 2, 5, 17, 30]),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.3]),
        top_k=rng.choice([0, 0, 5]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        seed=rng.randrange(1000),
        medusa=rng.random() < 0.8,
        tree=rng.choice(TREES),
        prompt_lookup=rng.choice([None, None, True, False]),
    )


def alone(prompt: list[int], options: DecodingOptions) -> list[int]:
    """What a request gets that has an engine of its own, without any drafts, chunks or a cache that others used."""
    engine = DecodingEngine(FakeBackend(), max_batch_size=1, reuse_prefixes=False)
    plain = DecodingOptions.of(options, medusa=False, prompt_lookup=False)
    return [token for [step] in engine.generate([prompt], options=plain) for token in step.token_ids]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    slots=st.integers(1, 5),
    chunk=st.sampled_from([1, 3, 16, 500]),
    costs=st.sampled_from([None, COSTS]),
    reuse=st.booleans(),
    lookup=st.booleans(),
    model=st.sampled_from([fake_backend.next_token, fake_backend.repeating_token]),
)
def test_random_arrivals_and_cancellations_change_no_token(seed, slots, chunk, costs, reuse, lookup, model) -> None:
    with patch.object(fake_backend, "next_token", model):
        random_arrivals(seed, slots, chunk, costs, reuse=reuse, lookup=lookup)


def random_arrivals(seed, slots, chunk, costs, *, reuse, lookup) -> None:
    rng = random.Random(seed)
    manifest = fake_manifest(max_prefill_tokens=chunk, num_heads=3, top_k=4)
    backend = FakeBackend("sometimes", manifest)
    engine = DecodingEngine(backend, max_batch_size=slots, costs=costs, reuse_prefixes=reuse, prompt_lookup=lookup)
    systems = [[rng.randrange(50) for _ in range(12)] for _ in range(2)]
    running: list[tuple[DecodingSequence, list[int]]] = []
    cancelled = set()
    for _ in range(rng.randrange(5, 40)):
        if rng.random() < 0.5 and len(running) < 12:
            prompt = [*rng.choice([*systems, []]), *(rng.randrange(50) for _ in range(rng.randrange(1, 8)))]
            running.append((engine.add(prompt, random_options(rng)), prompt))
        if running and rng.random() < 0.1:
            victim = rng.choice(running)[0]
            cancelled |= set() if victim.is_finished else {victim.id}
            engine.end(victim)
        engine.step()
    while not engine.is_idle:
        engine.step()
    for sequence, prompt in running:
        expected = alone(prompt, sequence.options)
        given_out = [token for step in sequence.take_steps() for token in step.token_ids]
        assert given_out == sequence.token_ids
        if sequence.id in cancelled:
            assert sequence.finish_reason == "cancelled"
            assert given_out == expected[: len(given_out)]
        else:
            assert (given_out, sequence.finish_reason) == (expected, "length")
    assert (engine.num_active, engine.num_waiting) == (0, 0)


def test_all_that_decode_share_one_forward_pass() -> None:
    backend = FakeBackend("never")
    engine = DecodingEngine(backend, CandidateTree.from_choices([[0], [1]]), max_batch_size=4)
    list(engine.generate([[1, 2], [3], [4, 5, 6]], 4))
    assert backend.steps == [(3, 3), (3, 3), (3, 3), (3, 1)]  # the prompts, padded to the longest, then their drafts


def reading(backend: FakeBackend, *, token_seconds: float, pass_seconds: float = 0.0, **settings) -> DecodingEngine:
    """An engine that plans its passes over prompts with these costs."""
    engine = DecodingEngine(backend, CandidateTree.root_only(), **settings)
    widths, batches = [1, 1000], [1, 100]
    seconds = [[pass_seconds + token_seconds * batch * width for width in widths] for batch in batches]
    engine._reader.costs = StepCosts(batches, widths, [64], [seconds], [0.1, 0.1])
    return engine


def finish(engine: DecodingEngine) -> None:
    while not engine.is_idle:
        engine.step()


def test_a_long_prompt_does_not_stall_those_that_decode() -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=900))
    engine = reading(backend, token_seconds=0.001, max_gap_seconds=0.0645)
    short = engine.add([1], DecodingOptions(max_new_tokens=50))
    engine.step()
    long = engine.add([2] * 640, DecodingOptions(max_new_tokens=3))
    given = []
    while not long.token_ids:
        engine.step()
        given.append(sum(len(step.token_ids) for step in short.take_steps()))
    assert given[0] == 2  # the first came before
    assert set(given[1:]) == {1}  # a token at each step
    assert max(tokens for batch, tokens in backend.steps[2:] if tokens > 1) <= 64  # a chunk takes no longer than the gap
    finish(engine)
    assert long.token_ids == greedy([2] * 640, 3)


def test_a_short_prompt_waits_for_one_chunk_of_a_long_one() -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=4000))
    engine = reading(backend, token_seconds=0.001)
    long = engine.add([2] * 3000, DecodingOptions(max_new_tokens=3))
    engine.step()
    short = engine.add([1, 2, 3], DecodingOptions(max_new_tokens=1))
    engine.step()
    assert short.token_ids == greedy([1, 2, 3], 1)
    assert not long.token_ids
    finish(engine)
    assert long.token_ids == greedy([2] * 3000, 3)


def test_long_prompts_take_turns() -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=4000))
    engine = reading(backend, token_seconds=0.001, reuse_prefixes=False)
    longs = [engine.add([number] * 2000, DecodingOptions(max_new_tokens=1)) for number in (1, 2, 3)]
    lengths = []
    while not all(long.is_finished for long in longs):
        engine.step()
        lengths.append([slot.length for slot in engine._slots if slot.sequence in longs])
    differences = [max(row) - min(row) for row in lengths if len(row) == 3]
    assert max(differences) <= 512
    assert [long.token_ids for long in longs] == [greedy([number] * 2000, 1) for number in (1, 2, 3)]


@pytest.mark.parametrize(("pass_seconds", "expected"), [(1.0, 1), (0.0, 8)])
def test_short_prompts_are_read_in_one_pass_if_their_first_tokens_then_come_sooner(pass_seconds, expected) -> None:
    """They do if a pass costs much and a token little. If only tokens cost, those in front would wait for those behind."""
    prompts = [[number, *range(1, 4)] for number in range(8)]
    backend = FakeBackend("never")
    engine = reading(backend, token_seconds=0.001, pass_seconds=pass_seconds)
    sequences = [engine.add(prompt, DecodingOptions(max_new_tokens=1)) for prompt in prompts]
    finish(engine)
    assert [sequence.token_ids for sequence in sequences] == [greedy(prompt, 1) for prompt in prompts]
    assert len(backend.steps) == expected


class Linear:
    """Costs of a second a pass, and `per_token` seconds a token."""

    is_warm = True

    def __init__(self, per_token: float) -> None:
        self.per_token = per_token

    def steps(self, batch: int, capacity: int, max_width: int) -> np.ndarray:
        return 1 + self.per_token * batch * np.arange(1, max_width + 1)

    def observe(self, *_: float) -> None:
        """Nothing is learned."""


@pytest.mark.parametrize(("per_token", "expected"), [(0.07, (2, 10)), (0.11, (1, 10))])
def test_two_prompts_share_a_pass_if_half_a_pass_alone_takes_longer_than_what_the_second_adds(per_token, expected) -> None:
    """Ten tokens more cost 0.7 or 1.1 seconds; a pass for them alone 1.7 or 2.1, for which one of the two would wait."""
    backend = FakeBackend()
    engine = DecodingEngine(backend, CandidateTree.root_only())
    engine._reader.costs = Linear(per_token)
    for first in (3, 4):
        engine.add([first] * 10, DecodingOptions(max_new_tokens=2))
    engine.step()
    assert backend.steps[0] == expected


def test_once_a_sequence_can_decode_no_other_prompt_is_read_before() -> None:
    backend = FakeBackend()
    engine = reading(backend, token_seconds=1.0)
    for prompt in ([3] * 5, [4] * 20):
        engine.add(prompt, DecodingOptions(max_new_tokens=4))
    engine.step()
    assert backend.steps == [(1, 5)]
    engine.step()
    assert backend.steps[1] == (1, 1)  # the first sequence's step


def test_the_gap_is_six_steps_of_decoding_if_none_is_given() -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=900))
    engine = reading(backend, token_seconds=0.001)
    engine.add([1], DecodingOptions(max_new_tokens=50))
    for _ in range(3):
        engine.step()
    engine._step_seconds = 0.01
    assert engine._gap_seconds == pytest.approx(0.06)
    engine.add([2] * 640, DecodingOptions(max_new_tokens=3))
    before = len(backend.steps)
    engine._read_prompts()
    [batch, tokens] = backend.steps[before]
    assert batch == 1
    assert 40 <= tokens <= 60  # what is left of 60 ms, at a token a millisecond


def test_a_prompt_that_begins_like_one_that_is_read_waits_for_its_entries() -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=2000))
    engine = reading(backend, token_seconds=0.001)
    system = [7] * 700
    sequences = [engine.add([*system, number], DecodingOptions(max_new_tokens=2)) for number in range(4)]
    finish(engine)
    assert [sequence.token_ids for sequence in sequences] == [greedy([*system, number], 2) for number in range(4)]
    assert [sequence.stats.num_cached_tokens for sequence in sequences[1:]] == [700, 700, 700]
    assert sum(batch * tokens for batch, tokens in backend.steps) < 1.2 * 700


def test_first_come_first_served() -> None:
    engine = DecodingEngine(FakeBackend(), max_batch_size=2)
    sequences = [engine.add([number], DecodingOptions(max_new_tokens=6)) for number in range(1, 7)]
    order = []
    while not engine.is_idle:
        order += [sequence.id for sequence in engine.step() if len(sequence.token_ids) and sequence.id not in order]
    assert order == [sequence.id for sequence in sequences]
    assert all(sequence.token_ids == greedy([number], 6) for number, sequence in enumerate(sequences, start=1))


def prefilled(backend: FakeBackend) -> int:
    """Tokens of prompts that were read: steps of one row on one slot, in a test that decodes nothing else."""
    return sum(tokens for _, tokens in backend.steps)


def test_a_prompt_that_begins_like_an_earlier_one_starts_from_its_cache() -> None:
    backend = FakeBackend()
    engine = DecodingEngine(backend, max_batch_size=3)
    system = list(range(20))
    chat = [*system, 30, 31]
    first = engine.add(chat, DecodingOptions(max_new_tokens=8))
    while not engine.is_idle:
        engine.step()
    follow_up = [*chat, *first.token_ids, 40]  # the history and what the user says next
    second = engine.add(follow_up, DecodingOptions(max_new_tokens=8))
    while not engine.is_idle:
        engine.step()
    assert second.token_ids == greedy(follow_up, 8)
    assert second.stats.num_cached_tokens >= len(chat) + 7  # but for what was accepted last, all of it
    beside = [engine.add([*system, 45, number], DecodingOptions(max_new_tokens=1)) for number in range(3)]
    while not engine.is_idle:
        engine.step()
    assert [sequence.stats.num_cached_tokens for sequence in beside] == [20, 20, 20]
    assert [sequence.token_ids for sequence in beside] == [greedy([*system, 45, number], 1) for number in range(3)]


def test_a_prefix_is_copied_from_a_sequence_that_still_decodes() -> None:
    engine = DecodingEngine(FakeBackend("always"), max_batch_size=2)
    prompt = list(range(15))
    first = engine.add(prompt, DecodingOptions(max_new_tokens=40))
    engine.step()
    second = engine.add(prompt, DecodingOptions(max_new_tokens=20))
    while not engine.is_idle:
        engine.step()
    assert second.stats.num_cached_tokens == 14  # the last token is read again: its logits are needed
    assert (first.token_ids, second.token_ids) == (greedy(prompt, 40), greedy(prompt, 20))


@pytest.mark.parametrize("is_broken", [False, True])
def test_what_a_failed_sequence_left_in_the_cache_is_not_used(is_broken: bool) -> None:
    backend, prompt = FakeBackend("never"), [5] * 20
    engine = DecodingEngine(backend, max_batch_size=1)

    def fail(_: FakeBackend) -> None:
        raise RuntimeError("the device fell over")

    first = engine.add(prompt, DecodingOptions(max_new_tokens=3))
    engine.step()
    backend.fails = fail if is_broken else None
    finish(engine)
    backend.fails = None
    second = engine.add(prompt, DecodingOptions(max_new_tokens=3))
    finish(engine)
    assert (first.finish_reason, second.finish_reason) == ("error" if is_broken else "length", "length")
    assert second.stats.num_cached_tokens == (0 if is_broken else 19)


def test_without_reuse_every_prompt_is_read_whole() -> None:
    engine = DecodingEngine(FakeBackend(), reuse_prefixes=False)
    for _ in range(2):
        sequence = engine.add([1, 2, 3], DecodingOptions(max_new_tokens=2))
        while not engine.is_idle:
            engine.step()
        assert sequence.stats.num_cached_tokens == 0


def test_the_cache_shrinks_when_it_has_long_been_too_large_and_what_is_left_is_still_right() -> None:
    backend = FakeBackend("sometimes", fake_manifest(max_seq_len=2000))
    engine = DecodingEngine(backend, max_batch_size=2)
    long, short = [7] * 1500, [8] * 30
    assert [s.token_ids for s in decode(engine, [long])] == [greedy(long, 5)]
    decode(engine, [short])
    [again] = decode(engine, [long])
    assert (again.token_ids, again.stats.num_cached_tokens) == (greedy(long, 5), 1499)  # one short request cost it nothing
    for _ in range(9):
        assert [s.token_ids for s in decode(engine, [short])] == [greedy(short, 5)]
    assert backend.capacity < 256
    assert [s.token_ids for s in decode(engine, [long, short])] == [greedy(long, 5), greedy(short, 5)]


def test_memory_for_a_long_prompt_is_taken_once() -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=2000))
    engine = DecodingEngine(backend, max_batch_size=2)
    engine.add([1], DecodingOptions(max_new_tokens=60))
    engine.step()
    capacities = []
    whole = backend.resize
    backend.resize = lambda slots, capacity, lengths=(): (capacities.append(capacity), whole(slots, capacity, lengths))
    long = engine.add([2] * 1500, DecodingOptions(max_new_tokens=1))
    while not long.is_finished:
        engine.step()
    assert len(capacities) <= 2


def decode(engine: DecodingEngine, prompts: list[list[int]]) -> list[DecodingSequence]:
    sequences = [engine.add(prompt, DecodingOptions(max_new_tokens=5)) for prompt in prompts]
    while not engine.is_idle:
        engine.step()
    return sequences


@pytest.mark.parametrize("place", ["allowed", "lets_pass", "forced"])
def test_what_fails_for_one_sequence_ends_it_alone(place) -> None:
    class Broken:
        num_tokens = 0

        def advance(self, token_ids):
            self.num_tokens += len(token_ids)

        def allowed(self, path):
            self.fail("allowed")
            return np.ones(50, bool)

        def lets_pass(self, path):
            self.fail("lets_pass")
            return True

        def forced(self):
            self.fail("forced")
            return []

        def fail(self, here):
            if here == place and self.num_tokens >= 3:
                raise ZeroDivisionError("a guide's own mistake")

    engine = DecodingEngine(FakeBackend())
    good = engine.add([1, 2], DecodingOptions(max_new_tokens=20))
    bad = engine.add([1, 2], DecodingOptions(max_new_tokens=20), guide=Broken())
    other = engine.add([7], DecodingOptions(max_new_tokens=20))
    while not engine.is_idle:
        engine.step()
    assert (bad.finish_reason, str(bad.error)) == ("error", "a guide's own mistake")
    assert bad.token_ids == greedy([1, 2], 20)[: len(bad.token_ids)]
    for sequence, prompt in ((good, [1, 2]), (other, [7])):
        assert (sequence.finish_reason, sequence.token_ids) == ("length", greedy(prompt, 20))
    assert engine.num_active == 0


def test_a_step_that_fails_ends_those_on_it_and_the_engine_goes_on() -> None:
    backend = FakeBackend()
    engine = DecodingEngine(backend, max_batch_size=2)
    waiting = [engine.add([number], DecodingOptions(max_new_tokens=9)) for number in (1, 2, 3)]
    engine.step()

    def fail(_: FakeBackend) -> None:
        backend.fails = None
        raise RuntimeError("the device is gone")

    backend.fails = fail
    while not engine.is_idle:
        engine.step()
    assert [sequence.finish_reason for sequence in waiting] == ["error", "error", "length"]
    assert waiting[2].token_ids == greedy([3], 9)


def test_a_sequence_that_does_not_fit_alone_ends_and_the_others_go_on(monkeypatch) -> None:
    backend = FakeBackend("never")
    whole = backend.resize

    def resize(num_slots, capacity, lengths=()):
        if capacity > 40:
            raise CapacityError("no memory")
        whole(num_slots, max(capacity, 20), lengths)

    monkeypatch.setattr(backend, "resize", resize)
    engine = DecodingEngine(backend, CandidateTree.root_only())
    long, short = (engine.add(prompt, DecodingOptions(max_new_tokens=15)) for prompt in ([5] * 30, [6]))
    while not engine.is_idle:
        engine.step()
    assert long.finish_reason == "error"
    assert isinstance(long.error, CapacityError)
    assert short.token_ids == greedy([6], 15)


def test_trees_shrink_where_they_do_not_pay() -> None:
    dear = StepCosts([1, 8], [1, 16], [64], [[[1.0, 16.0], [8.0, 128.0]]], [0.1, 0.8])  # every node costs what a step does
    cheap = StepCosts([1, 8], [1, 16], [64], [[[1.0, 1.001], [1.0, 1.001]]], [0.001, 0.001])
    widths = {}
    for name, costs in (("dear", dear), ("cheap", cheap)):
        backend = FakeBackend("never" if name == "dear" else "always")
        engine = DecodingEngine(backend, DynamicTree(16), costs=costs)
        list(engine.generate([[1], [2], [3]], 60))
        widths[name] = [tokens for batch, tokens in backend.steps if batch == 3]
    assert np.mean(widths["dear"]) < 1.5
    assert np.mean(widths["cheap"][:-2]) > 10  # the last steps need no more


@pytest.mark.parametrize(("base", "per_token"), [(0.03, 0.0015), (0.01, 0.01), (0.002, 0.00001)])
def test_costs_are_learned_from_the_steps_that_are_made(base, per_token) -> None:
    rng, costs = np.random.default_rng(0), LearnedCosts()
    for _ in range(300):
        batch, width = int(rng.integers(1, 9)), int(rng.integers(1, 9))
        costs.observe(batch, width, 256, (base + per_token * batch * width) * rng.uniform(0.95, 1.05))
        costs.observe_heads(batch, 0.004 * rng.uniform(0.9, 1.1))
    found, expected = costs.steps(4, 256, 16), base + per_token * 4 * np.arange(1, 17)
    np.testing.assert_allclose(found, expected, rtol=0.15)
    assert 0.0035 < costs.heads(5) < 0.0045


@pytest.mark.parametrize("width", [1, 16])
def test_what_is_learned_stays_sound_however_long_the_load_is_the_same(width) -> None:
    costs = LearnedCosts()
    for step in range(60_000):
        costs.observe(1, width, 128 + 64 * (step // 100 % 4), 0.02 + 0.0011 * width)
    found = costs.steps(1, 256, 16)
    assert found[width - 1] == pytest.approx(0.02 + 0.0011 * width, rel=0.1)
    assert (np.diff(found) >= 0).all()
    assert found[15] < 10 * found[0]


def test_what_a_guide_forces_is_not_the_heads_merit() -> None:
    from medusa_runtime.drafting.budget import DraftBudget

    budget = DraftBudget(StepCosts([1, 8], [1, 16], [64], [[[1.0, 16.0], [8.0, 128.0]]], [5.0, 5.0]))
    before = budget.plan([np.array([0.5, 0.2], np.float32)], 1, 64)
    tries = 0
    while budget.wants_heads(1) and tries < 100:
        budget.learn(before, before.width, 0)
        tries += 1
    asked = budget.wants_heads(1)
    for _ in range(100):
        plan = budget.plan([np.empty(0, np.float32)], 9, 64)
        assert plan.width == 9
        budget.learn(plan, 9, 0)
    assert (before.width, asked) == (1, False)
    assert budget.plan([np.array([0.5, 0.2], np.float32)], 1, 64).width == 1


def test_a_stall_of_the_machine_is_no_lesson() -> None:
    costs = LearnedCosts()
    for _ in range(50):
        costs.observe(1, 4, 256, 0.03)
    before = costs.steps(1, 256, 8)
    costs.observe(1, 4, 256, 3.0)
    np.testing.assert_allclose(costs.steps(1, 256, 8), before, rtol=0.2)


def test_a_request_that_brings_its_tree_gets_all_of_it() -> None:
    dear = StepCosts([1, 8], [1, 16], [64], [[[1.0, 16.0], [8.0, 128.0]]], [0.1, 0.8])
    backend = FakeBackend("never")
    list(DecodingEngine(backend, costs=dear).generate([[1]], 9, tree=DynamicTree(7)))
    assert [tokens for _, tokens in backend.steps[1:-2]] == [7] * 6


def test_a_tree_that_changes_the_answer_does_not_shrink() -> None:
    dear = StepCosts([1, 8], [1, 16], [64], [[[1.0, 16.0], [8.0, 128.0]]], [0.1, 0.8])
    options = DecodingOptions(max_new_tokens=30, temperature=0.8, acceptance="typical", seed=3)
    answers = []
    for costs in (None, dear):
        engine = DecodingEngine(FakeBackend(), DynamicTree(16), costs=costs)
        answers.append([token for [step] in engine.generate([[1]], options=options) for token in step.token_ids])
    assert answers[0] == answers[1]


def test_costs_are_measured_saved_and_read_again(tmp_path) -> None:
    costs = StepCosts.measure(FakeBackend(), max_batch_size=5, max_nodes=6, capacities=(64, 128))
    assert (costs.batch_sizes, costs.widths, costs.capacities) == ([1, 4, 5], [1, 4, 6], [64, 128])
    assert np.array(costs.step_seconds).shape == (2, 3, 3)
    assert (np.array(costs.step_seconds) > 0).all()
    costs.save(tmp_path / "costs.json")
    assert StepCosts.load(tmp_path / "costs.json") == costs


def test_costs_between_and_beyond_what_was_measured_are_linear() -> None:
    costs = StepCosts([1, 5], [1, 3], [100, 200], [[[1, 3], [5, 7]], [[2, 4], [6, 8]]], [1.0, 3.0])
    np.testing.assert_allclose(costs.steps(1, 100, 5), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(costs.steps(3, 150, 2), [3.5, 4.5])
    np.testing.assert_allclose(costs.steps(9, 300, 1), [11.0])
    np.testing.assert_allclose(costs.steps(1, 50, 1), [0.5])
    assert costs.heads(3) == 2.0


TABLE = '{"batch_sizes": [1], "widths": %s, "capacities": [64], "step_seconds": [[[1.0]]], "head_seconds": [%s]}'


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"batch_sizes": [1]}', TABLE % ('["a"]', 1.0), TABLE % ("[1, 1]", 1.0), TABLE % ("[1]", 0.0)]
)
def test_damaged_costs_are_refused(tmp_path, text) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(Exception, match="holds no step costs"):
        StepCosts.load(tmp_path / "costs.json")


def test_an_engine_refuses_a_batch_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="max_batch_size is 0"):
        DecodingEngine(FakeBackend(), max_batch_size=0)
    small = FakeBackend(manifest=fake_manifest(max_batch_size=4))
    with pytest.raises(CapacityError, match="max_batch_size is 9, the bundle takes 4"):
        DecodingEngine(small, max_batch_size=9)
    assert DecodingEngine(small).max_batch_size == 4
    with pytest.raises(OptionError, match="costs is 'Learn'"):
        DecodingEngine(small, costs="Learn")


def test_min_new_tokens_holds_without_max_new_tokens() -> None:
    engine = DecodingEngine(FakeBackend(manifest=fake_manifest(max_seq_len=400)))
    sequence = engine.add([1], DecodingOptions(min_new_tokens=300))
    while not engine.is_idle:
        engine.step()
    assert len(sequence.token_ids) == 300


def test_a_probability_above_one_by_rounding_makes_no_orphan() -> None:
    candidates = candidates_for(DynamicTree(3), 2, 2)
    log_probs = np.array([[-0.1, -2.0], [2e-7, -3.0]], np.float32)
    found = candidates.proposals(0, HeadGuesses(np.array([[1, 2], [3, 4]]), log_probs), 2)
    assert found.likeliest(3).parents.tolist() == [-1, 0, 1]
    assert found.likeliest(2).depths.tolist() == [0, 1]
