"""Candidate trees as data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.bundle.tree_shapes import most_likely_tree, prior_tree, pruned
from medusa_runtime import CandidateTree, TreeError

paths = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=12)


@given(paths)
def test_a_tree_of_choices_holds_each_choice_and_its_inner_nodes_once(choices) -> None:
    tree = CandidateTree.from_choices(choices)
    found = []
    for node in range(tree.num_nodes):
        path, at = [], node
        while at:
            path.append(tree.ranks[at])
            at = tree.parents[at]
        found.append(tuple(reversed(path)))
    wanted = {tuple(choice[:depth]) for choice in choices for depth in range(len(choice) + 1)} | {()}
    assert sorted(found) == sorted(wanted)


@given(paths)
def test_mask_and_depths_follow_the_parents(choices) -> None:
    tree = CandidateTree.from_choices(choices)
    for node in range(tree.num_nodes):
        ancestors, at = {node}, node
        while at:
            at = tree.parents[at]
            ancestors.add(at)
        assert set(np.flatnonzero(tree.mask[node])) == ancestors
        assert tree.depths[node] == len(ancestors) - 1
    assert not np.triu(tree.mask, 1).any()  # parents first: what some attention kernels rely on


@given(paths)
def test_json_gives_back_the_same_tree(choices) -> None:
    tree = CandidateTree.from_choices(choices)
    assert CandidateTree.from_json(tree.to_json()) == tree
    assert CandidateTree.from_json(choices) == CandidateTree.from_json({"choices": choices}) == tree


@given(paths, st.integers(0, 4))
def test_pruning_keeps_what_is_shallow_enough(choices, max_depth) -> None:
    tree = CandidateTree.from_choices(choices)
    shallow = CandidateTree.from_choices([choice[:max_depth] for choice in choices if choice[:max_depth]])
    assert pruned(tree, max_depth) == shallow


def test_children_without_ranks_take_them_in_order() -> None:
    assert CandidateTree.from_parents([-1, 0, 0, 1, 0]).ranks == (0, 0, 1, 0, 2)


@pytest.mark.parametrize(
    ("parents", "ranks", "message"),
    [
        ([], [], "first parent must be -1"),
        ([0], [0], "first parent must be -1"),
        ([-1, 2, 0], [0, 0, 1], "node 1 has parent 2"),
        ([-1, -1], [0, 1], "node 1 has parent -1"),
        ([-1, 0], [0], "2 parents, 1 ranks"),
        ([-1, 0, 0], [0, 1, 1], "same rank"),
        ([-1, 0], [0, -2], "ranks count from 0"),
        ([-1, 0], [0, 0.5], "whole numbers"),
        ([-1, False], [0, 0], "whole numbers"),
    ],
)
def test_what_is_no_tree_is_refused(parents, ranks, message) -> None:
    with pytest.raises(TreeError, match=message):
        CandidateTree.from_parents(parents, ranks)


@pytest.mark.parametrize("data", [{"nodes": 3}, 7, "x", [["a"]], [[0.5]], [[True]], [3], {"parents": 3}, {"choices": 3}, None])
def test_json_of_another_form_is_refused_in_one_line(data) -> None:
    with pytest.raises(TreeError) as caught:
        CandidateTree.from_json(data)
    assert "\n" not in str(caught.value)


def test_a_tree_file_that_cannot_be_read_is_named(tmp_path) -> None:
    (tmp_path / "tree.json").write_text("[[0")
    with pytest.raises(TreeError, match=r"tree\.json"):
        CandidateTree.from_file(tmp_path / "tree.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(TreeError, match=r"deep\.json"):
        CandidateTree.from_file(tmp_path / "deep.json")
    with pytest.raises(TreeError, match=r"none\.json"):
        CandidateTree.from_file(tmp_path / "none.json")


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_most_likely_tree_is_the_best_of_all_trees(num_heads, top_k, num_nodes, random) -> None:
    acceptance = np.array([[random.random() for _ in range(top_k)] for _ in range(num_heads)], np.float32)

    def value(path) -> float:
        return float(np.prod([acceptance[depth, rank] for depth, rank in enumerate(path)]))

    every = [path for depth in range(1, num_heads + 1) for path in itertools.product(range(top_k), repeat=depth)]
    best = sorted((value(path) for path in every), reverse=True)[: num_nodes - 1]
    tree = most_likely_tree(acceptance, num_nodes)
    found = [
        np.prod([acceptance[tree.depths[node] - 1, tree.ranks[node]] for node in np.flatnonzero(tree.mask[leaf])[1:]])
        for leaf in range(1, tree.num_nodes)
    ]
    assert tree.num_nodes == min(num_nodes, 1 + len(every))
    assert np.isclose(sum(found), sum(best), rtol=1e-4)


def test_the_prior_tree_fits_its_heads() -> None:
    for num_heads, top_k, num_nodes in itertools.product((1, 4), (1, 10), (1, 16, 64)):
        tree = prior_tree(num_heads, top_k, num_nodes)
        tree.check_fits(num_heads, top_k)
        assert tree.num_nodes <= num_nodes


def test_the_prior_tree_trusts_early_heads_and_low_ranks_most() -> None:
    """Of heads that are right 0.45, 0.27 … of the time, and of ranks each two fifths as often as the one before."""
    choices = [
        [0],
        [1],
        [2],
        [3],
        [4],
        [0, 0],
        [0, 1],
        [0, 2],
        [1, 0],
        [1, 1],
        [2, 0],
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
        [1, 0, 0],
    ]
    found, expected = prior_tree(4, 10, 16), CandidateTree.from_choices(choices)
    assert CandidateTree.from_choices(paths_of(found)) == expected
    assert found.num_nodes == expected.num_nodes


def paths_of(tree: CandidateTree) -> list[list[int]]:
    """The ranks on the way to each node but the root."""
    return [[tree.ranks[node] for node in np.flatnonzero(tree.mask[leaf])[1:]] for leaf in range(1, tree.num_nodes)]


def test_a_tree_needs_as_many_heads_as_it_is_deep_and_as_many_candidates_as_its_ranks() -> None:
    tree = CandidateTree.from_choices([[0, 2], [1]])
    tree.check_fits(2, 3)
    with pytest.raises(TreeError, match="the tree is 2 deep, the bundle has 1 heads"):
        tree.check_fits(1, 3)
    with pytest.raises(TreeError, match="uses the best 3 tokens of a head, the bundle's heads give 2"):
        tree.check_fits(2, 2)
