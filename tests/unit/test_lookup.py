"""Prompt lookup: what came after the same tokens before, how likely it is, and that it changes no token of any answer."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.bundle.tree_shapes import prior_tree
from medusa_runtime import CandidateTree, DecodingEngine, DecodingStats, DynamicTree, StepCosts
from medusa_runtime.arrays import TokenBuffer
from medusa_runtime.drafting.budget import DraftBudget
from medusa_runtime.drafting.lookup import LONGEST_MATCH, MAX_CONTINUATIONS, RATE_PRIOR, Continuation, PromptLookup
from medusa_runtime.drafting.proposals import HeadGuesses, candidates_for
from tests.support import fake_backend
from tests.support.fake_backend import FakeBackend, fake_manifest, repeating_token

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
DEAR = StepCosts([1, 8], [1, 16], [64], [[[1.0, 1000.0], [8.0, 8000.0]]], [0.1, 0.8])
SHORT_AND_DEAR = StepCosts([1], [1, 16], [64], [[[1e-8, 1e-5]]], [1e-9])  # looking up takes longer than a step
CHEAP = StepCosts([1, 8], [1, 16], [64], [[[1.0, 1.001], [1.0, 1.001]]], [0.001, 0.001])


class Lookup(PromptLookup):
    """Prompt lookup on tokens of its own."""

    def __init__(self, prompt_ids: list[int], max_new_tokens: int = 100) -> None:
        self.tokens = TokenBuffer(prompt_ids, max_new_tokens)
        super().__init__(self.tokens)

    def extend(self, token_ids: list[int]) -> None:
        """Decide tokens."""
        self.tokens.append(token_ids)
        self.learn(token_ids)


def said(token_ids: list[int], depth: int = 3) -> list[list[int]]:
    return [found.token_ids for found in Lookup(token_ids).continuations(depth)]


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([1], []),
        ([1, 2, 3], []),
        ([1, 2, 3, 4, 1], [[2, 3, 4]]),
        ([1, 2, 7, 8, 9, 1, 3, 5, 6, 1], [[3, 5, 6], [2, 7, 8]]),  # of equally long matches the latest
        ([4, 1, 2, 7, 8, 5, 1, 3, 7, 8, 4, 1], [[2, 7, 8], [3, 7, 8]]),  # the longest match comes first
        ([1, 2, 9, 1, 2, 8, 1, 2], [[8, 1, 2], [9, 1, 2]]),
        ([1, 2, 7, 1, 2, 7, 5, 1], [[2, 7, 5]]),  # the same next token is named once
        ([6, 1, 2, 1, 2], [[1, 2, 1]]),  # what reaches the end goes on repeating
        ([6, 6], [[6, 6, 6]]),
        ([1, 2, 1, 3, 1, 4, 1, 5, 1], [[5, 1, 5], [4, 1, 5], [3, 1, 4]]),  # no more than three
    ],
)
def test_what_came_after_the_same_tokens(token_ids, expected) -> None:
    assert said(token_ids) == expected


def test_tokens_that_are_added_are_found_and_matched() -> None:
    lookup = Lookup([1, 2, 3])
    assert lookup.continuations(2) == []
    lookup.extend([9, 1])
    assert [found.token_ids for found in lookup.continuations(2)] == [[2, 3]]
    lookup.extend([2, 7, 9])
    assert [found.token_ids for found in lookup.continuations(2)] == [[1, 2]]
    assert lookup.continuations(0) == []


@settings(max_examples=300, deadline=None)
@given(token_ids=st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_matches_are_the_longest_there_are(token_ids) -> None:
    def length(end: int) -> int:
        pairs = zip(reversed(token_ids[: end + 1]), reversed(token_ids), strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), end + 1)
        return min(same, LONGEST_MATCH)

    best: dict[int, tuple[int, int]] = {}  # by next token: the longest match, and of those the latest
    for end in range(len(token_ids) - 1):
        if length(end):
            best[token_ids[end + 1]] = max(best.get(token_ids[end + 1], (0, 0)), (length(end), end))
    expected = sorted(best.values(), reverse=True)[:MAX_CONTINUATIONS]
    assert list(Lookup(token_ids)._matches()) == expected


def test_a_longer_match_is_likelier_and_so_is_what_follows_it() -> None:
    short, long = (Lookup(ids).continuations(9)[0].chances for ids in ([7, 1, 2, 3, 4, 1], [7, 1, 2, 3, 4, 1, 2, 3]))
    assert short[0] == RATE_PRIOR[0] < long[0] == RATE_PRIOR[2]
    assert short[2:4] == long[:2]
    assert short == sorted(short)
    assert short[-1] == RATE_PRIOR[-1]


def learned(lookup: PromptLookup, decided: int, times: int) -> list[float]:
    """Chances of first tokens after the same token was decided again and again."""
    for _ in range(times):
        lookup.continuations(1)
        lookup.learn([decided])
    return [found.chances[0] for found in lookup.continuations(1)]


def test_it_learns_how_often_guesses_are_right() -> None:
    [right], [wrong] = (learned(Lookup([1, 2, 5, 1]), decided, 50) for decided in (2, 9))
    assert wrong < RATE_PRIOR[0] / 2
    assert right > 3 * RATE_PRIOR[0]


def test_a_guess_counts_up_to_its_first_wrong_token() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 1])
    before = [rate.value for rate in lookup._rates]
    lookup.continuations(4)  # 2, 3, 4, 5
    lookup.extend([2, 3, 9, 5])
    after = [rate.value for rate in lookup._rates]
    assert [np.sign(b - a) for a, b in zip(before, after, strict=True)] == [1, 1, -1, 0, 0, 0, 0, 0]


def test_other_continuations_count_where_the_first_was_wrong() -> None:
    lookup = Lookup([1, 2, 1, 3, 1, 4, 1])
    assert [found.token_ids[0] for found in lookup.continuations(1)] == [4, 3, 2]
    before = lookup._others.value
    lookup.extend([4])
    assert lookup._others.value == before
    lookup.extend([1])
    lookup.continuations(1)  # 4, 3, 2 again
    lookup.extend([3])
    assert lookup._others.value > before


@pytest.mark.parametrize("decided", [4, 9])
def test_chances_stay_chances_however_long_a_sequence_is(decided) -> None:
    chances = learned(Lookup([1, 2, 1, 3, 1, 4, 1]), decided, 20_000)
    assert len(chances) == 3
    assert all(0 < chance < 1 for chance in chances)
    assert sum(chances) < 1


# Merging with the heads' candidates


def log_probs_of(seed: int) -> np.ndarray:
    chances = np.sort(np.random.default_rng(seed).dirichlet(np.full(7, 0.3), 3)[:, :4], axis=1)[:, ::-1]
    return np.log(chances + 1e-6).astype(np.float32)


continuations = st.dictionaries(
    st.integers(0, 9), st.lists(st.tuples(st.integers(0, 9), st.floats(0.01, 0.99)), max_size=11), max_size=3
)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6), named=continuations, first=st.floats(0.01, 0.3), num_nodes=st.integers(1, 20),
    is_dynamic=st.booleans(), has_heads=st.booleans(), forbidden=st.sampled_from([None, 3]),
)  # fmt: skip
def test_a_merged_draft_is_the_likeliest_tree_of_all_that_is_named(
    seed, named, first, num_nodes, is_dynamic, has_heads, forbidden
) -> None:
    tree = DynamicTree(12) if is_dynamic else prior_tree(3, 4, 12)
    heads = np.random.default_rng(seed).permuted(np.tile(np.arange(10), (3, 1)), axis=1)[:, :4]
    said = [
        Continuation([token, *(one for one, _ in rest)], [first, *(chance for _, chance in rest)])
        for token, rest in named.items()
    ]
    guesses = HeadGuesses(heads, log_probs_of(seed)) if has_heads else None
    places = candidates_for(tree, 3, 4)
    found = places.proposals(5, guesses, 3, said)
    alone = places.proposals(5, guesses, 3)
    passes = None if forbidden is None else lambda path: forbidden not in path
    draft = found.likeliest(num_nodes, passes)

    paths = [tuple(draft.tokens[row][1:].tolist()) for row in draft.mask]
    assert len(set(paths)) == draft.num_nodes  # a token path is one node, whoever names it
    assert all(path[:-1] in paths for path in paths)
    assert draft.depths.tolist() == [len(path) for path in paths] == sorted(draft.depths)
    every: dict[tuple[int, ...], float] = {}
    for node in range(len(found.tokens)):
        path = path_of(found, node)
        assert path not in every
        every[path] = float(found.scores[node])
        assert node == 0 or found.scores[node] <= found.scores[found.parents[node]]
    assert {path_of(alone, node) for node in range(len(alone.tokens))} <= set(every)
    if has_heads:
        assert (found.scores[: len(alone.scores)] >= alone.scores).all()  # a continuation makes no candidate less likely
    looked_up = {tuple(one.token_ids[:depth]) for one in said for depth in range(1, len(one.token_ids) + 1)}
    assert {path_of(found, node) for node in np.flatnonzero(found.looked_up)} == looked_up <= set(every)
    allowed = {path: score for path, score in every.items() if forbidden not in path or not path}
    best = sorted(allowed.values(), reverse=True)[:num_nodes]
    np.testing.assert_allclose(sorted((every[path] for path in paths), reverse=True), best, rtol=1e-5)


def path_of(found, node: int) -> tuple[int, ...]:
    path: tuple[int, ...] = ()
    while node:
        path, node = (int(found.tokens[node]), *path), int(found.parents[node])
    return path


def test_a_token_that_both_name_has_the_larger_probability_and_lifts_what_is_below() -> None:
    places = candidates_for(CandidateTree.from_choices([[0], [0, 0], [1]]), 2, 2)
    log_probs = np.log(np.array([[0.5, 0.2], [0.4, 0.1]], np.float32))
    found = places.proposals(0, HeadGuesses(np.array([[1, 2], [3, 4]]), log_probs), 2, [Continuation([1, 7], [0.8, 0.5])])
    chances = {path_of(found, node): float(np.exp(found.scores[node])) for node in range(5)}
    assert chances == pytest.approx({(): 1.0, (1,): 0.8, (2,): 0.2, (1, 3): 0.32, (1, 7): 0.4})
    weak = places.proposals(0, HeadGuesses(np.array([[1, 2], [3, 4]]), log_probs), 2, [Continuation([1], [0.3])])
    assert float(np.exp(weak.scores[1])) == pytest.approx(0.5)


# The engine, on a model that repeats itself


def decode(backend: FakeBackend, num_tokens: int = 120, *, engine: dict | None = None, **options) -> DecodingStats:
    """Decode a prompt with a model that repeats itself, and check the answer."""
    stats = DecodingStats()
    with patch.object(fake_backend, "next_token", repeating_token):
        decoding = DecodingEngine(backend, **(engine or {}))
        answer = [
            token for [step] in decoding.generate([PROMPT], num_tokens, stats=stats, **options) for token in step.token_ids
        ]
        assert answer == fake_backend.greedy(PROMPT, num_tokens)
    return stats


def test_lookups_give_more_tokens_a_step_where_answers_repeat() -> None:
    without = decode(FakeBackend("never"))
    both = decode(FakeBackend("never"), prompt_lookup=True)
    assert (without.tokens_per_step, without.num_looked_up_tokens) == (1.0, 0)
    assert both.tokens_per_step > 2.5
    assert both.num_looked_up_tokens == both.num_accepted_tokens > 30
    assert len(both.accepted_by_depth) == 7  # deeper than the three heads, up to the tree's eight nodes


def test_what_follows_the_end_of_an_answer_does_not_count() -> None:
    stats = DecodingStats()
    with patch.object(fake_backend, "next_token", repeating_token):
        prompt = [*PROMPT, *fake_backend.greedy(PROMPT, 80)]  # which goes on repeating itself
        expected = fake_backend.greedy(prompt, 8)
        engine = DecodingEngine(FakeBackend("never"), prompt_lookup=True)
        list(engine.generate([prompt], 20, stats=stats, stop_token_ids=expected[4:5]))
    assert (stats.num_generated_tokens, stats.num_steps) == (5, 1)
    assert stats.num_looked_up_tokens == stats.num_accepted_tokens == 4


def test_heads_and_lookups_together_are_better_than_either() -> None:
    both = decode(FakeBackend("sometimes"), prompt_lookup=True)
    heads, lookups = (decode(FakeBackend("sometimes"), **options) for options in ({}, {"medusa": False, "prompt_lookup": True}))
    assert both.tokens_per_step > max(heads.tokens_per_step, lookups.tokens_per_step)
    assert 0 < both.num_looked_up_tokens < both.num_accepted_tokens


@pytest.mark.parametrize(
    ("engine", "options", "most"),
    [
        ({}, {"medusa": False}, 8),  # as many nodes as the engine's tree has
        ({"tree": CandidateTree.root_only()}, {}, 16),  # which may have no room
        ({}, {"medusa": False, "tree": DynamicTree(5)}, 5),
    ],
)
def test_lookups_need_no_heads(engine, options, most) -> None:
    backend = FakeBackend()
    backend.propose = None  # nobody asks
    stats = decode(backend, engine=engine, prompt_lookup=True, **options)
    assert stats.tokens_per_step > 2
    assert max(tokens for _, tokens in backend.steps[1:]) == most


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 20])
def test_drafts_end_where_the_answer_must(num_tokens) -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=len(PROMPT) + num_tokens))
    given: list[int] = []
    whole = backend.step

    def step(*args, **kwargs):
        if args[0].shape[1] != len(PROMPT):
            deepest = int(args[1].max()) - len(PROMPT) + 1  # where the deepest draft is in the answer
            given.append(deepest)
        return whole(*args, **kwargs)

    backend.step = step
    decode(backend, num_tokens, prompt_lookup=True)
    assert max(given, default=0) < num_tokens


def test_who_asks_is_heard_and_a_request_with_a_tree_keeps_it() -> None:
    on = {"prompt_lookup": True}
    assert decode(FakeBackend(), engine=on).num_looked_up_tokens > 0
    assert decode(FakeBackend(), engine=on, prompt_lookup=False).num_looked_up_tokens == 0
    assert decode(FakeBackend()).num_looked_up_tokens == 0
    tree = CandidateTree.from_choices([[0], [1]])
    assert decode(FakeBackend(), engine=on, tree=tree).num_looked_up_tokens == 0
    backend = FakeBackend("never")
    assert decode(backend, tree=tree, prompt_lookup=True).num_looked_up_tokens > 0
    assert max(tokens for _, tokens in backend.steps[1:]) == 3


def test_the_budget_narrows_and_widens_lookups_too() -> None:
    for costs, widest in ((DEAR, 1), (CHEAP, 8)):
        backend = FakeBackend("never")
        decode(backend, engine={"costs": costs}, prompt_lookup=True)
        assert max(tokens for _, tokens in backend.steps[1:]) == widest


def test_heads_rest_where_lookups_do_without_them_and_only_there() -> None:
    budget = DraftBudget(StepCosts([1, 8], [1, 16], [64], [[[1.0, 1.6], [1.0, 1.6]]], [0.1, 0.1]))
    copied = np.cumprod(np.full(15, 0.95, np.float32))
    own = np.array([0.6, 0.4, 0.3, 0.2], np.float32)
    none = np.empty(0, np.float32)
    asked = {"copying": 0, "else": 0}
    for _ in range(100):
        for name, looked_up, chances in (("copying", copied, copied), ("else", none, own)):
            asks = budget.wants_heads(1, [looked_up])
            budget.note_heads(asked=asks)
            asked[name] += asks
            plan = budget.plan([chances], 1, 64, [looked_up], with_heads=asks)
            budget.learn(plan, plan.width, round(float(chances[: plan.width - 1].sum())))
    assert asked["else"] == 100
    assert asked["copying"] < 25
    before = [one.worth for one in budget._situations.values()]
    plan = budget.plan([own[2:]], 1, 64, [own[2:]], with_heads=False)  # heads that were not asked show nothing
    budget.learn(plan, plan.width, 0)
    assert [one.worth for one in budget._situations.values()] == before


def test_heads_that_rest_cost_no_lookups() -> None:
    costs = StepCosts([1, 8], [1, 16], [64], [[[1.0, 1.01], [1.0, 1.01]]], [9.0, 9.0])
    backend, calls = FakeBackend("never"), []
    whole = backend.propose
    backend.propose = lambda rows, root_ids: (calls.append(len(rows)), whole(rows, root_ids))[1]
    stats = decode(backend, engine={"costs": costs}, prompt_lookup=True)
    assert len(calls) < 0.75 * stats.num_steps
    assert stats.tokens_per_step > 2


def test_lookups_rest_where_no_draft_pays() -> None:
    calls, whole = [], PromptLookup.continuations
    with patch.object(PromptLookup, "continuations", lambda self, depth: calls.append(depth) or whole(self, depth)):
        stats = decode(FakeBackend("never"), 60, engine={"costs": SHORT_AND_DEAR}, prompt_lookup=True)
    assert stats.num_steps == 59
    assert 3 <= len(calls) <= 12  # some times at first, and then after every 16 steps


def test_lookups_never_rest_if_the_answer_depends_on_them() -> None:
    calls, whole, stats = [], PromptLookup.continuations, DecodingStats()
    engine = DecodingEngine(FakeBackend(), costs=SHORT_AND_DEAR, max_batch_size=1)
    with patch.object(PromptLookup, "continuations", lambda self, depth: calls.append(depth) or whole(self, depth)):
        list(engine.generate([PROMPT], 60, stats=stats, temperature=0.8, acceptance="typical", seed=1, prompt_lookup=True))
    assert len(calls) == stats.num_steps  # the last step ends the answer, and before the first one there is another
