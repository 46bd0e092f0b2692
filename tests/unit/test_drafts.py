"""Drafts: which candidates a step verifies, and which of them greedy decoding accepts."""

from __future__ import annotations

import itertools
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.bundle.tree_shapes import prior_tree
from medusa_runtime import CandidateTree, DynamicTree, TreeError
from medusa_runtime.arrays import TokenBuffer
from medusa_runtime.drafting.draft import Draft, DraftBatch
from medusa_runtime.drafting.proposals import Drafter, HeadGuesses, candidates_for
from medusa_runtime.sampling.acceptance import accept_greedy
from tests.support.drafts import draft_of


def random_log_probs(seed: int, heads: int, width: int) -> np.ndarray:
    """As heads give them: best first. Ties and impossible tokens included. [K, M]"""
    rng = np.random.default_rng(seed)
    chances = np.sort(np.round(rng.dirichlet(np.full(width + 3, 0.3), heads)[:, :width], 2), axis=1)[:, ::-1]
    with np.errstate(divide="ignore"):
        return np.log(chances).astype(np.float32)


def test_drafts_are_taken_from_the_head_of_their_depth() -> None:
    tree = CandidateTree.from_choices([[0], [1], [1, 2]])
    head_ids = np.array([[10, 11, 12], [20, 21, 22]])
    candidates = candidates_for(tree, 2, 3)
    draft = candidates.proposals(5, HeadGuesses(head_ids, np.zeros((2, 3), np.float32)), 2).likeliest(4)
    assert draft.tokens.tolist() == [5, 10, 11, 22]
    assert draft.parents.tolist() == [-1, 0, 0, 2]
    assert draft.depths.tolist() == [0, 1, 1, 2]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), num_nodes=st.integers(1, 40), heads=st.integers(1, 5), width=st.integers(1, 10))
def test_a_dynamic_tree_is_the_likeliest_of_all_trees_of_its_size(seed, num_nodes, heads, width) -> None:
    log_probs = random_log_probs(seed, heads, width)
    candidates = candidates_for(DynamicTree(num_nodes), heads, width)
    guesses = HeadGuesses(np.arange(heads * width).reshape(heads, width), log_probs)
    draft = candidates.proposals(7, guesses, heads).likeliest(num_nodes)

    every = [
        sum(float(log_probs[depth, rank]) for depth, rank in enumerate(path))
        for depth in range(1, min(heads, 3) + 1)
        for path in itertools.product(range(width), repeat=depth)
    ]
    ranks, depths = draft.tokens % width, draft.depths
    found = np.zeros(draft.num_nodes)
    for node in range(1, draft.num_nodes):
        parent = int(draft.parents[node])
        assert parent < node
        assert depths[node] == depths[parent] + 1
        assert draft.tokens[node] // width == depths[node] - 1  # from the head of its depth
        found[node] = found[parent] + log_probs[depths[node] - 1, ranks[node]]
    assert len({tuple(draft.tokens[draft.mask[node]]) for node in range(draft.num_nodes)}) == draft.num_nodes
    if heads <= 3:
        best = sorted(every, reverse=True)[: num_nodes - 1]
        assert draft.num_nodes == min(num_nodes, 1 + len(every))
        np.testing.assert_allclose(np.exp(sorted(found[1:], reverse=True)), np.exp(best), rtol=1e-4)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), num_nodes=st.integers(1, 30), max_depth=st.integers(0, 4), is_dynamic=st.booleans())
def test_any_part_of_a_tree_is_a_tree(seed, num_nodes, max_depth, is_dynamic) -> None:
    tree = DynamicTree(30) if is_dynamic else prior_tree(4, 8, 30)
    candidates = candidates_for(tree, 4, 8)
    guesses = HeadGuesses(np.arange(32).reshape(4, 8), random_log_probs(seed, 4, 8))
    draft = candidates.proposals(7, guesses, max_depth).likeliest(num_nodes)
    assert 1 <= draft.num_nodes <= num_nodes
    assert draft.depths.max() <= max_depth
    assert draft.parents[0] == -1
    for node in range(draft.num_nodes):
        above = [] if node == 0 else np.flatnonzero(draft.mask[draft.parents[node]]).tolist()
        assert np.flatnonzero(draft.mask[node]).tolist() == [*above, node]


def test_a_static_tree_is_verified_whole() -> None:
    tree = prior_tree(4, 10, 16)
    candidates = candidates_for(tree, 4, 10)
    draft = candidates.proposals(1, HeadGuesses(np.arange(40).reshape(4, 10), random_log_probs(3, 4, 10)), 4).likeliest(16)
    paths = {tuple(draft.tokens[row][1:] % 10) for row in draft.mask}
    expected = {tuple(np.array(tree.ranks)[row][1:]) for row in tree.mask}
    assert paths == expected


def test_only_paths_that_pass_are_drafted() -> None:
    guesses = HeadGuesses(np.arange(12).reshape(3, 4), random_log_probs(5, 3, 4))
    found = candidates_for(DynamicTree(12), 3, 4).proposals(0, guesses, 3)
    draft = found.likeliest(12, lambda path: all(token % 2 == 0 for token in path))
    assert (draft.tokens % 2 == 0).all()
    assert draft.num_nodes > 3
    none = found.likeliest(12, lambda _: False)
    assert none.tokens.tolist() == [0]


@pytest.mark.parametrize("num_nodes", [0, -1, 1025, 2.0, True])
def test_a_dynamic_tree_has_a_sensible_size(num_nodes) -> None:
    with pytest.raises(TreeError, match="a dynamic tree has 1 to 1024 nodes"):
        DynamicTree(num_nodes)


def test_acceptance_needs_the_whole_path() -> None:
    tree = CandidateTree.from_choices([[0], [1], [0, 0], [1, 0], [1, 0, 0]])  # nodes 1, 2, then 3 below 1, 4 below 2, 5 below 4
    batch = DraftBatch.of([draft_of(tree, [5, 10, 11, 20, 21, 30])])
    greedy_ids = np.array([[11, 99, 77, 99, 30, 40]])  # node 2 is right, node 4 is not, node 5 below it would be
    [accepted] = accept_greedy(batch, greedy_ids)
    assert (accepted.nodes, accepted.bonus_id) == ([0, 2], 77)
    greedy_ids[0, 2] = 21
    [accepted] = accept_greedy(batch, greedy_ids)
    assert (accepted.nodes, accepted.bonus_id) == ([0, 2, 4, 5], 40)


def test_padding_is_seen_by_nobody_and_never_accepted() -> None:
    small, large = CandidateTree.root_only(), CandidateTree.from_choices([[0], [0, 0]])
    batch = DraftBatch.of([draft_of(small, [0]), draft_of(large, [3, 0, 0])])
    assert batch.mask[0].tolist() == np.eye(3, dtype=bool).tolist()
    assert batch.depths[0].tolist() == [0, 0, 0]
    accepted = accept_greedy(batch, np.zeros((2, 3), np.int64))  # token 0 is always right, and padding holds token 0
    assert [one.nodes for one in accepted] == [[0], [0, 1, 2]]


class Forces:
    """A guide that leaves no choice about the next tokens."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = list(token_ids)

    def forced(self) -> list[int]:
        return self.token_ids


@pytest.mark.parametrize(("num_nodes", "remaining", "tokens"), [(8, 9, [3, 7, 8, 9]), (3, 9, [3, 7, 8]), (8, 2, [3, 7])])
def test_what_a_guide_forces_follows_the_last_token_as_far_as_there_is_room(num_nodes, remaining, tokens) -> None:
    candidates = candidates_for(DynamicTree(num_nodes), 3, 4)
    drafter = Drafter(TokenBuffer([1, 2, 3], 20), candidates, num_nodes=num_nodes, guide=Forces(7, 8, 9))
    found = drafter.propose(None, remaining)
    assert (found.is_forced, found.num_nodes, len(found.chances)) == (True, len(tokens), 0)
    draft = found.draft(len(tokens))
    assert draft.tokens.tolist() == tokens
    assert draft.parents.tolist() == list(range(-1, len(tokens) - 1))


def test_lookups_alone_would_give_a_draft_of_the_likeliest() -> None:
    drafter = Drafter(TokenBuffer([5, 6, 7, 8, 5, 9, 5], 20), candidates_for(DynamicTree(4), 3, 4), num_nodes=4, looks_up=True)
    assert len(drafter.lookup_chances) == 0
    drafter.look_up(20)
    first, other = drafter._continuations
    every = sorted([*np.cumprod(first.chances), *np.cumprod(other.chances)], reverse=True)
    assert len(every) > 3
    np.testing.assert_allclose(drafter.lookup_chances, every[:3], rtol=1e-6)


def test_a_child_is_found_below_its_own_parent() -> None:
    tokens, parents, depths = np.array([[1, 5, 6, 5, 6], [-1, 0, 0, 2, 1], [0, 1, 1, 2, 2]])
    draft = Draft(tokens, parents, depths, np.zeros(5, np.float32), np.zeros(5, np.bool_))
    assert [draft.child(0, 5), draft.child(2, 5), draft.child(1, 6)] == [1, 3, 4]
    assert draft.child(1, 5) is None
    assert draft.children(0).tolist() == [1, 2]


@pytest.mark.parametrize(("num_nodes", "heads", "top_k"), [(2, 3, 4), (6, 3, 4), (16, 3, 10), (16, 2, 3)])
def test_candidates_are_those_that_leave_room_for_all_that_is_likelier(num_nodes: int, heads: int, top_k: int) -> None:
    """With a node of ranks r1, r2 … from 1, a draft of the likeliest also holds r1 + r1·r2 + … nodes and the root."""
    paths = [path for depth in range(1, heads + 1) for path in itertools.product(range(1, top_k + 1), repeat=depth)]
    fitting = [path for path in paths if 1 + sum(itertools.accumulate(path, operator.mul)) <= num_nodes]
    found = candidates_for(DynamicTree(num_nodes), heads, top_k)
    assert len(found.parents) == 1 + len(fitting)
    assert found.ends == tuple(1 + sum(len(path) <= depth for path in fitting) for depth in range(len(found.ends)))
