"""The candidate tree that a bundle starts with."""

from __future__ import annotations

import heapq
from pathlib import Path

import numpy as np

from medusa_export.progress import note
from medusa_heads.errors import CheckpointError
from medusa_heads.formats import native
from medusa_heads.replay import Evaluation
from medusa_runtime.arrays import FloatArray
from medusa_runtime.drafting.tree import CandidateTree


def tree_for(heads_path: Path, digest_: str, num_heads: int, top_k: int, num_nodes: int) -> CandidateTree:
    """The tree a bundle starts with: the best of that size in the heads' evaluation, or else `prior_tree`.

    Args:
        heads_path: the heads' directory.
        digest_: the heads' digest; an evaluation of other heads is not used.
        num_heads: number of heads.
        top_k: candidates that each head will return.
        num_nodes: nodes of the tree, including the root.

    Raises:
        CheckpointError: the evaluation in the heads' directory is damaged.
    """
    place = heads_path / native.EVALUATION_NAME
    if heads_path.is_dir() and place.is_file():
        try:
            evaluation = Evaluation.model_validate_json(place.read_text(encoding="utf-8"))
            most = [max(result.tree["ranks"], default=0) for result in evaluation.trees]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{place} is damaged; make it again with: medusa-export heads evaluate") from error
        fitting = [
            result for result, rank in zip(evaluation.trees, most, strict=True) if result.nodes == num_nodes and rank < top_k
        ]
        if evaluation.heads != digest_:
            note(f"{place} is of other heads, so it is not used; make it again with: medusa-export heads evaluate")
        elif fitting:
            return CandidateTree.from_json(max(fitting, key=lambda result: result.tokens_per_step).tree)
        else:
            note(f"{place} has no tree of {num_nodes} nodes that needs only {top_k} candidates per head; using a default tree")
    return prior_tree(num_heads, top_k, num_nodes)


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
    frontier: list[
        tuple[float, int, int, int, float]
    ] = []  # -probability, parent, depth, index into order, parent's probability

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
