"""Ranks, the best trees and replayed decoding, each against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from medusa_export.bundle.tree_shapes import most_likely_tree
from medusa_heads.config import HeadsConfig
from medusa_heads.evaluate import evaluate, target_ranks
from medusa_heads.modules import MedusaHeads
from medusa_heads.replay import NOT_VALID, TOP_K, accepted_drafts, accuracies, best_tree, expected_tokens, replay
from medusa_heads.train.examples import Example
from medusa_heads.train.hidden import HiddenStates
from medusa_runtime.drafting.tree import CandidateTree

C, V = 6, 30


def ranks_of(lengths: list[int], num_heads: int, seed: int, most: int = 3) -> np.ndarray:
    """Random ranks of answers, valid as far as each answer goes."""
    generator = np.random.default_rng(seed)
    ranks = generator.choice([*range(most), TOP_K], (sum(lengths), num_heads))
    left = np.concatenate([np.arange(length)[::-1] for length in lengths])  # tokens after each row
    return np.where(np.arange(num_heads) < left[:, None], ranks, NOT_VALID)


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@st.composite
def trees(draw: st.DrawFn, most_nodes: int = 7, width: int = 4) -> CandidateTree:
    paths = draw(st.lists(st.lists(st.integers(0, width - 1), min_size=1, max_size=3), max_size=most_nodes))
    return CandidateTree.from_choices(paths)


def all_trees(num_nodes: int, depth: int, width: int) -> list[CandidateTree]:
    """Every tree of at most that many nodes."""
    paths = [path for d in range(1, depth + 1) for path in itertools.product(range(width), repeat=d)]
    sets = (set(chosen) for count in range(num_nodes) for chosen in itertools.combinations(paths, count))
    return [CandidateTree.from_choices(chosen) for chosen in sets if all(path[:-1] in chosen | {()} for path in chosen)]


def one_step(ranks: list[int], tree: CandidateTree) -> int:
    """Drafts accepted at one row: down the tree as long as a child has the right rank."""
    children = {(parent, rank): node for node, (parent, rank) in enumerate(zip(tree.parents, tree.ranks, strict=True)) if node}
    node = accepted = 0
    for rank in ranks:
        if (node, rank) not in children:
            break
        node, accepted = children[node, rank], accepted + 1
    return accepted


# --- ranks


def judged(shared: bool = True, **settings: Any) -> tuple[MedusaHeads, nn.Linear, HiddenStates]:
    torch.manual_seed(0)
    config = HeadsConfig(base_model="tiny", num_heads=3, hidden_size=C, vocab_size=V, shared_lm_head=shared, **settings)
    heads = MedusaHeads(config)
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    generator = np.random.default_rng(1)
    examples = [Example(str(n), (n,), tuple(generator.integers(0, V, length))) for n, length in enumerate([5, 1, 8, 3])]
    rows = generator.normal(size=(17, C)).astype(np.float16)
    return heads, nn.Linear(C, V, bias=False), HiddenStates(rows, examples)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reads_root", [True, False])
@pytest.mark.parametrize("drafted", [None, range(0, V, 2), range(3)])
def test_ranks_count_the_drafted_tokens_that_a_head_likes_better(drafted, shared, reads_root, monkeypatch) -> None:
    monkeypatch.setattr("medusa_heads.evaluate.ROWS", 4)
    heads, lm_head, states = judged(shared, reads_root=reads_root)
    heads.draft_ids = None if drafted is None else list(drafted)
    known = np.arange(V) if drafted is None else np.array(drafted)
    rows, root_ids = torch.from_numpy(states.rows.astype(np.float32)), torch.from_numpy(states.next_ids)
    logits = heads(rows, lm_head, root_ids).detach().numpy()  # [P, K, V]
    targets = states.targets(np.arange(17), 3)
    ranks = target_ranks(heads, lm_head, states)
    for row, k in itertools.product(range(17), range(3)):
        guesses = known[np.argsort(-logits[row, k, known])].tolist()
        place = guesses.index(targets[row, k]) if targets[row, k] in guesses else TOP_K
        assert ranks[row, k] == (NOT_VALID if targets[row, k] < 0 else min(place, TOP_K))
    some = np.array([9, 0, 16])
    assert (target_ranks(heads, lm_head, states, some) == ranks[some]).all()


def test_results_are_told_by_source() -> None:
    heads, lm_head, states = judged()
    heads.draft_ids = [0, 1, 2]
    assert evaluate(heads, lm_head, states, digest="", data="", nodes=(4,)).sources == []
    states.sources = ["sums", "sums", "poems", "poems"]  # answers of 5, 1, 8 and 3 tokens, of which every second is judged
    found = {result.source: result for result in evaluate(heads, lm_head, states, digest="", data="", nodes=(4,)).sources}
    assert {source: (result.answers, result.tokens) for source, result in found.items()} == {"sums": (1, 1), "poems": (1, 3)}
    last = states.next_ids[-3:]
    assert found["poems"].not_guessed == pytest.approx(np.mean(last > 2), abs=1e-4)


def test_of_equal_logits_the_first_comes_first() -> None:
    heads, lm_head, states = judged()
    nn.init.zeros_(lm_head.weight)
    targets, ranks = states.targets(np.arange(17), 3), target_ranks(heads, lm_head, states)
    assert (ranks == np.where(targets < 0, NOT_VALID, np.minimum(targets, TOP_K))).all()


def test_what_is_no_number_is_never_right() -> None:
    heads, lm_head, states = judged()
    nn.init.constant_(heads.heads[1].blocks[0].linear.bias, torch.nan)
    ranks = target_ranks(heads, lm_head, states)
    assert set(ranks[:, 1].tolist()) == {NOT_VALID, TOP_K}
    assert (ranks[:, 0] < TOP_K).any()


@given(LENGTHS, st.integers(1, 4), st.integers(0, 99))
def test_accuracies_are_shares_of_the_valid_rows(lengths, num_heads, seed) -> None:
    ranks = ranks_of(lengths, num_heads, seed)
    found = accuracies(ranks)
    for k, rank in itertools.product(range(num_heads), range(TOP_K)):
        valid = [row for row in ranks[:, k] if row != NOT_VALID]
        assert found[k, rank] == pytest.approx(sum(row == rank for row in valid) / max(1, len(valid)))


# --- steps and whole answers


@given(LENGTHS, st.integers(1, 4), st.integers(0, 99), trees())
def test_accepted_drafts_equal_a_walk_down_the_tree(lengths, num_heads, seed, tree) -> None:
    ranks = ranks_of(lengths, num_heads, seed)
    assert accepted_drafts(ranks, tree).tolist() == [one_step(row, tree) for row in ranks.tolist()]


@given(LENGTHS, st.integers(1, 4), st.integers(0, 99), trees())
def test_replay_equals_decoding_token_by_token(lengths, num_heads, seed, tree) -> None:
    ranks = ranks_of(lengths, num_heads, seed)
    starts = np.cumsum(lengths) - lengths
    tokens = steps = 0
    for start, length in zip(starts, lengths, strict=True):
        done = 1  # by the prefill
        while done < length:
            done += one_step(ranks[start + done - 1].tolist(), tree) + 1
            steps += 1
        tokens += length - 1
    assert replay(ranks, starts, tree) == (pytest.approx(tokens / steps) if steps else 0)


@given(LENGTHS.filter(lambda lengths: max(lengths) > 1), st.integers(1, 4))
def test_replay_of_heads_that_are_never_and_always_right(lengths, num_heads) -> None:
    starts = np.cumsum(lengths) - lengths
    chain = CandidateTree.from_choices([(0,) * num_heads])
    valid = ranks_of(lengths, num_heads, 0) != NOT_VALID
    never, always = np.where(valid, TOP_K, NOT_VALID), np.where(valid, 0, NOT_VALID)
    assert replay(never, starts, chain) == 1
    assert replay(always, starts, CandidateTree.root_only()) == 1
    steps = sum(-(-(length - 1) // (num_heads + 1)) for length in lengths)
    assert replay(always, starts, chain) == pytest.approx((sum(lengths) - len(lengths)) / steps)


# --- trees


@pytest.mark.parametrize("num_nodes", range(1, 6))
@pytest.mark.parametrize("seed", range(4))
def test_no_tree_of_the_size_accepts_more(num_nodes, seed) -> None:
    ranks = ranks_of([7, 5, 9], 3, seed, most=2)
    tree = best_tree(ranks, num_nodes)
    best = max(int(accepted_drafts(ranks, other).sum()) for other in all_trees(num_nodes, 3, 2))
    assert tree.num_nodes <= num_nodes
    assert int(accepted_drafts(ranks, tree).sum()) == best


@given(LENGTHS, st.integers(1, 4), st.integers(0, 99), st.integers(1, 40))
def test_best_trees_grow_into_each_other_and_hold_no_idle_node(lengths, num_heads, seed, num_nodes) -> None:
    ranks = ranks_of(lengths, num_heads, seed)
    tree, larger = best_tree(ranks, num_nodes), best_tree(ranks, num_nodes + 1)
    tree.check_fits(num_heads, TOP_K)
    assert larger.parents[: tree.num_nodes] == tree.parents
    assert larger.ranks[: tree.num_nodes] == tree.ranks
    if larger.num_nodes > tree.num_nodes:
        assert accepted_drafts(ranks, larger).sum() > accepted_drafts(ranks, tree).sum()


def test_a_tree_knows_which_heads_are_right_together() -> None:
    ranks = np.array([[0, 0]] * 4 + [[1, 1]] * 6)  # alone, head 2's rank 1 is best everywhere, after rank 0 it never is
    assert best_tree(ranks, 3) == CandidateTree.from_choices([(1,), (1, 1)])


@given(arrays.arrays(np.float64, (2, 3), elements=st.floats(0, 0.33)), trees(width=3).filter(lambda tree: tree.depth <= 2))
def test_expected_tokens_sum_the_products_along_paths(accuracy, tree) -> None:
    wide = np.zeros((2, TOP_K))
    wide[:, :3] = accuracy
    paths = [[tree.ranks[node] for node in np.flatnonzero(tree.mask[leaf])[1:]] for leaf in range(tree.num_nodes)]
    wanted = sum(np.prod([wide[depth, rank] for depth, rank in enumerate(path)]) for path in paths)
    assert expected_tokens(wide, tree) == pytest.approx(wanted)
    likeliest = most_likely_tree(wide.astype(np.float32), tree.num_nodes)
    assert expected_tokens(wide, likeliest) >= expected_tokens(wide, tree) - 1e-6


# --- the whole


def test_trees_are_searched_and_judged_on_different_answers() -> None:
    heads, lm_head, states = judged()
    given_tree = CandidateTree.from_choices([(0,), (1,)])
    found = evaluate(heads, lm_head, states, digest="d", data="e", trees=[given_tree], nodes=[1, 8])
    ranks = target_ranks(heads, lm_head, states)
    searched = np.r_[0:5, 6:14]  # the first and the third answer; the others have 1 and 3 rows
    others = np.r_[5:6, 14:17]
    assert (found.heads, found.base_model, found.data, found.answers, found.tokens) == ("d", "tiny", "e", 4, 17)
    np.testing.assert_allclose(found.accuracy, accuracies(ranks))
    for result, tree in zip(found.trees, [given_tree, CandidateTree.root_only(), best_tree(ranks[searched], 8)], strict=True):
        assert CandidateTree.from_json(result.tree) == tree
        assert result.tokens_per_step == replay(ranks[others], [0, 1], tree)
        assert result.expected == expected_tokens(accuracies(ranks), tree)
    assert found.trees[1].tokens_per_step == 1


def test_a_single_answer_is_searched_and_judged() -> None:
    heads, lm_head, states = judged()
    one = HiddenStates(states.rows[:5], [Example("0", (0,), tuple(states.next_ids[:5]))])
    found = evaluate(heads, lm_head, one, digest="d", data="e", nodes=[4])
    assert (found.answers, found.tokens) == (1, 5)
    assert found.trees[0].tokens_per_step >= 1
