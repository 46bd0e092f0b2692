"""Candidate trees from the probabilities of drafts."""

from __future__ import annotations

import heapq

import numpy as np

from medusa_runtime.arrays import FloatArray
from medusa_runtime.drafting.tree import CandidateTree


def most_likely_tree(acceptance: FloatArray, num_nodes: int) -> CandidateTree:
    """The tree of `num_nodes` nodes with the most expected accepted drafts.

    A node is accepted if every node on its path is. If these events are independent, a node's probability is the product
    along its path, which never grows with depth. So adding the most likely possible node each time is optimal.

    Args:
        acceptance: ``acceptance[k, r]`` is the probability that head k's token of rank r is right. [K, M]
        num_nodes: nodes of the tree, including the root.
    """
    heads, width = acceptance.shape
    order = np.argsort(-acceptance, axis=1, kind="stable")  # [K, M]
    parents, ranks = [-1], [0]
    # -probability, parent, depth, index into order, parent's probability
    frontier: list[tuple[float, int, int, int, float]] = []

    def offer(parent: int, depth: int, place: int, parent_probability: float) -> None:
        if depth < heads and place < width:
            probability = parent_probability * float(acceptance[depth, order[depth, place]])
            heapq.heappush(frontier, (-probability, parent, depth, place, parent_probability))

    offer(0, 0, 0, 1.0)
    while frontier and len(parents) < num_nodes:
        negative, parent, depth, place, parent_probability = heapq.heappop(frontier)
        node = len(parents)
        parents.append(parent)
        ranks.append(int(order[depth, place]))
        offer(parent, depth, place + 1, parent_probability)
        offer(node, depth + 1, 0, -negative)
    return CandidateTree(tuple(parents), tuple(ranks))


def prior_tree(num_heads: int, top_k: int, num_nodes: int = 16) -> CandidateTree:
    """A tree for heads of unknown accuracy.

    It assumes the accuracies typical of trained Medusa heads: each head is right about three fifths as often as the one before
    (0.45, 0.27 …), and each rank about two fifths as often as the one before. `most_likely_tree` with measured accuracies
    is better.
    """
    head = 0.45 * 0.6 ** np.arange(num_heads, dtype=np.float32)  # [K]
    rank = 0.4 ** np.arange(top_k, dtype=np.float32)  # [M]
    return most_likely_tree((head[:, None] * rank[None, :]).astype(np.float32), num_nodes)


def paths(tree: CandidateTree) -> list[list[int]]:
    """The nodes from the root to each leaf, the root included."""
    inner = set(tree.parents)
    return [np.flatnonzero(tree.mask[leaf]).tolist() for leaf in range(tree.num_nodes) if leaf not in inner]


def pruned(tree: CandidateTree, max_depth: int) -> CandidateTree:
    """The part of a tree that is at most `max_depth` deep; the tree itself if nothing is deeper."""
    if max_depth >= tree.depth:
        return tree
    kept = [node for node in range(tree.num_nodes) if tree.depths[node] <= max_depth]
    index = {node: position for position, node in enumerate(kept)} | {-1: -1}
    return CandidateTree(tuple(index[tree.parents[node]] for node in kept), tuple(tree.ranks[node] for node in kept))
