"""What recorded ranks are worth under a tree of candidates, by replaying the decoding loop over them. Without PyTorch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from medusa_runtime.drafting.tree import CandidateTree

IntArray = npt.NDArray[np.int64]
TOP_K = 10  # ranks told apart
TREE_NODES = (4, 8, 16, 32, 64)  # sizes for which the best trees are given
NOT_VALID = -1  # instead of a rank, where the answer is over


class TreeResult(BaseModel):
    """What one tree gives."""

    model_config = ConfigDict(extra="forbid")

    nodes: int
    tokens_per_step: float = Field(description="by replaying the decoding loop over the answers, bonus token included")
    expected: float = Field(description="by multiplying the heads' accuracies along each path, as if they were independent")
    tree: dict[str, list[int]]


class Evaluation(BaseModel):
    """Accuracy of heads, and the trees it makes best. Kept as `evaluation.json`; tree search reads it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    heads: str = Field(description="digest of the heads")
    base_model: str
    data: str = Field(description="digest of the answers")
    answers: int
    tokens: int
    accuracy: list[list[float]] = Field(description="[K][10]: how often the token of rank r of head k is the right one")
    trees: list[TreeResult]

    def top(self, head: int, count: int) -> float:
        """How often the right token is among the best `count` of a head."""
        return sum(self.accuracy[head][:count])


def accuracies(ranks: IntArray) -> npt.NDArray[np.float64]:
    """How often each rank of each head is the right one, among its valid rows. [n, K] -> [K, TOP_K]"""
    counts = np.stack([np.bincount(column[column >= 0], minlength=TOP_K + 1)[:TOP_K] for column in ranks.T])
    shares: npt.NDArray[np.float64] = counts / np.maximum(1, (ranks >= 0).sum(0))[:, None]
    return shares


def best_tree(ranks: IntArray, num_nodes: int) -> CandidateTree:
    """The tree whose nodes are right most often, counted over all rows.

    Counts along a path never grow, so taking the node that is right most often among those that can be added next is optimal;
    unlike a product of accuracies this knows that heads are right and wrong together.

    Args:
        ranks: see `medusa_heads.evaluate.target_ranks`. [n, K]
        num_nodes: the root included. Fewer come where no further node is ever right.
    """
    parents, tree_ranks = [-1], [0]
    frontier: list[tuple[int, int, int, int, IntArray]] = []  # -count, order, parent, rank, rows that are right so far

    def offer(node: int, depth: int, rows: IntArray) -> None:
        if depth == ranks.shape[1]:
            return
        column = ranks[rows, depth]
        for rank, count in enumerate(np.bincount(column[column >= 0], minlength=TOP_K)[:TOP_K]):
            if count:
                heapq.heappush(frontier, (-int(count), len(parents) * TOP_K + rank, node, rank, rows[column == rank]))

    depths = [0]
    offer(0, 0, np.arange(len(ranks)))
    while frontier and len(parents) < num_nodes:
        _, _, parent, rank, rows = heapq.heappop(frontier)
        parents.append(parent)
        tree_ranks.append(rank)
        depths.append(depths[parent] + 1)
        offer(len(parents) - 1, depths[-1], rows)
    return CandidateTree(tuple(parents), tuple(tree_ranks))


def accepted_drafts(ranks: IntArray, tree: CandidateTree) -> IntArray:
    """How many drafts a step that starts at each row has accepted. [n, K] -> [n]"""
    children = {(parent, rank): node for node, (parent, rank) in enumerate(zip(tree.parents, tree.ranks, strict=True)) if node}
    lookup = np.full((tree.num_nodes, TOP_K + 2), -1)  # the last two columns: further ranks, and not valid
    for (parent, rank), node in children.items():
        if rank < TOP_K:
            lookup[parent, rank] = node
    reached, accepted = np.zeros(len(ranks), np.int64), np.zeros(len(ranks), np.int64)
    for depth in range(min(tree.depth, ranks.shape[1])):
        reached = np.where(reached >= 0, lookup[reached, ranks[:, depth]], -1)  # -1 as a rank is the last column
        accepted += reached >= 0
    return accepted


def replay(ranks: IntArray, starts: Sequence[int] | IntArray, tree: CandidateTree) -> float:
    """Tokens per step of greedy decoding over whole answers: what the runtime would report for them.

    Args:
        ranks: of all rows of the answers. [P, K]
        starts: where each answer's rows begin.
        tree: what each step verifies.
    """
    accepted = accepted_drafts(ranks, tree)
    num_tokens = num_steps = 0
    for start, end in zip(starts, [*starts[1:], len(ranks)], strict=True):
        row = int(start)
        while row < end - 1:  # a step at the last row would have nothing to give
            row += int(accepted[row]) + 1
            num_steps += 1
        num_tokens += int(end - start) - 1  # the first comes from the prefill
    return num_tokens / num_steps if num_steps else 0.0


def expected_tokens(accuracy: npt.NDArray[np.float64], tree: CandidateTree) -> float:
    """Tokens per step if every head were right independently: the root's bonus token, and each node's probability."""
    probability = np.ones(tree.num_nodes)
    for node in range(1, tree.num_nodes):
        rank = tree.ranks[node]
        right = accuracy[tree.depths[node] - 1, rank] if rank < TOP_K else 0.0
        probability[node] = probability[tree.parents[node]] * right
    return float(probability.sum())
