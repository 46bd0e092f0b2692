"""The parts of a decoding step that need no engine: what to verify, and what to accept."""

from __future__ import annotations

import numpy as np

from medusa_runtime.tree import CandidateTree, IntArray


def draft_tokens(tree: CandidateTree, root_ids: IntArray, head_ids: IntArray | None) -> IntArray:
    """The tree's tokens: the root, then for the node at depth d with rank r the token of rank r of head d.

    Args:
        tree: N nodes.
        root_ids: the decided token of each sequence. [B]
        head_ids: the heads' candidates, best first; not needed for a tree of the root alone. [B, K, M]

    Returns:
        Token ids. [B, N]
    """
    tokens = np.empty((len(root_ids), tree.num_nodes), np.int64)
    tokens[:, 0] = root_ids
    if head_ids is not None:
        tokens[:, 1:] = head_ids[:, tree.depths[1:] - 1, list(tree.ranks[1:])]
    return tokens


def accept_greedy(tree: CandidateTree, tokens: IntArray, greedy_ids: IntArray) -> list[IntArray]:
    """For each sequence the longest path of drafts that greedy decoding would have produced too.

    A draft is right when it equals the most likely token after its parent, and accepted when all of its path is right.
    Siblings hold different tokens, so no two nodes of one depth are accepted.

    Args:
        tree: N nodes.
        tokens: what was verified. [B, N]
        greedy_ids: the most likely token after each node. [B, N]

    Returns:
        For each sequence the accepted nodes from the root on, which is always accepted. B arrays [A], A ≥ 1.
    """
    right = np.ones(tokens.shape, np.bool_)
    right[:, 1:] = tokens[:, 1:] == greedy_ids[:, list(tree.parents[1:])]
    accepted = ~np.any(tree.mask & ~right[:, None, :], axis=2)  # [B, N]: no ancestor is wrong
    return [np.flatnonzero(row) for row in accepted]
