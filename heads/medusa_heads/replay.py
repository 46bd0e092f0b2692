"""Replays decoding with a candidate tree on recorded ranks, to measure tokens per step. It does not need PyTorch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from medusa_runtime.drafting.tree import CandidateTree

IntArray = npt.NDArray[np.int64]
TOP_K = 10  # number of ranks that are distinguished
TREE_NODES = (4, 8, 16, 32, 64)  # sizes of the best trees in an evaluation
NOT_VALID = -1  # stands for a rank after the end of the answer


class TreeResult(BaseModel):
    """A tree with its tokens per step."""

    model_config = ConfigDict(extra="forbid")

    nodes: int
    tokens_per_step: float = Field(description="by replaying the decoding loop over the answers, including bonus tokens")
    expected: float = Field(description="by multiplying the heads' accuracies along each path, as if they were independent")
    tree: dict[str, list[int]]


class SourceResult(BaseModel):
    """How heads do on the answers to prompts of one source."""

    model_config = ConfigDict(extra="forbid")

    source: str
    answers: int
    tokens: int
    not_guessed: float = Field(description="part of the tokens that no head can guess, as the draft vocabulary lacks them")
    nodes: int = Field(description="size of the tree")
    tokens_per_step: float = Field(description="with the best tree of this size, by replay")


class Evaluation(BaseModel):
    """Accuracy of heads, and the best trees for it. It is stored as `evaluation.json`, from which trees are chosen."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    heads: str = Field(description="digest of the heads")
    base_model: str
    data: str = Field(description="digest of the answers")
    answers: int
    tokens: int
    accuracy: list[list[float]] = Field(description="[K][10]: how often head k's token of rank r is right")
    trees: list[TreeResult]
    sources: list[SourceResult] = Field(default_factory=list, description="by source of the prompts, if there are several")

    def top(self, head: int, count: int) -> float:
        """How often the right token is among the top `count` of a head."""
        return sum(self.accuracy[head][:count])


def accuracies(ranks: IntArray) -> npt.NDArray[np.float64]:
    """How often each rank of each head is right, among the head's valid rows. [n, K] -> [K, TOP_K]"""
    counts = np.stack([np.bincount(column[column >= 0], minlength=TOP_K + 1)[:TOP_K] for column in ranks.T])
    shares: npt.NDArray[np.float64] = counts / np.maximum(1, (ranks >= 0).sum(0))[:, None]
    return shares


def best_tree(ranks: IntArray, num_nodes: int) -> CandidateTree:
    """The tree whose nodes are right most often in total, counted over all rows.

    Counts never grow along a path, so adding the possible node with the highest count each time is optimal. Unlike products of
    accuracies, counts include that heads tend to be right or wrong together.

    Args:
        ranks: see `medusa_heads.evaluate.target_ranks`. [n, K]
        num_nodes: nodes of the tree, including the root. The tree is smaller if no further node is ever right.
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
    """The number of accepted drafts of a step that starts at each row. [n, K] -> [n]"""
    children = {(parent, rank): node for node, (parent, rank) in enumerate(zip(tree.parents, tree.ranks, strict=True)) if node}
    lookup = np.full((tree.num_nodes, TOP_K + 2), -1)  # the last two columns are for TOP_K and NOT_VALID
    for (parent, rank), node in children.items():
        if rank < TOP_K:
            lookup[parent, rank] = node
    reached, accepted = np.zeros(len(ranks), np.int64), np.zeros(len(ranks), np.int64)
    for depth in range(min(tree.depth, ranks.shape[1])):
        reached = np.where(reached >= 0, lookup[reached, ranks[:, depth]], -1)  # NOT_VALID is -1, which indexes the last column
        accepted += reached >= 0
    return accepted


def replay(ranks: IntArray, starts: Sequence[int] | IntArray, tree: CandidateTree) -> float:
    """Tokens per step of greedy decoding over whole answers, as the runtime would report them.

    Args:
        ranks: the ranks of all rows of the answers. [P, K]
        starts: first row of each answer.
        tree: the tree that each step verifies.
    """
    accepted = accepted_drafts(ranks, tree)
    num_tokens = num_steps = 0
    for start, end in zip(starts, [*starts[1:], len(ranks)], strict=True):
        row = int(start)
        while row < end - 1:  # no token follows the last row
            row += int(accepted[row]) + 1
            num_steps += 1
        num_tokens += int(end - start) - 1  # the first token comes from the prefill
    return num_tokens / num_steps if num_steps else 0.0


def expected_tokens(accuracy: npt.NDArray[np.float64], tree: CandidateTree) -> float:
    """Tokens per step if heads were independent: 1 for the bonus token, plus the probability of each node."""
    probability = np.ones(tree.num_nodes)
    for node in range(1, tree.num_nodes):
        rank = tree.ranks[node]
        right = accuracy[tree.depths[node] - 1, rank] if rank < TOP_K else 0.0
        probability[node] = probability[tree.parents[node]] * right
    return float(probability.sum())
