"""Drafts: which candidate tokens a step verifies, chosen for each sequence from what its heads say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from medusa_runtime.tree import BoolArray, CandidateTree, DynamicTree, FloatArray, IntArray


@dataclass(frozen=True)
class Draft:
    """The tokens of one sequence that a step verifies. Node 0 is the root; parents come before their children."""

    tokens: IntArray  # [N]
    parents: IntArray  # [N], the root's is -1
    depths: IntArray  # [N]
    mask: BoolArray  # [N, N], as `CandidateTree.mask`

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Draft:
        """The root, and tokens that follow it one after the other."""
        count = len(tokens)
        return cls(np.array(tokens), np.arange(-1, count - 1), np.arange(count), np.tri(count, dtype=np.bool_))

    @property
    def num_nodes(self) -> int:
        """The root included."""
        return len(self.tokens)

    def children(self, node: int) -> IntArray:
        """The nodes below a node."""
        return np.flatnonzero(self.parents == node)

    def child(self, node: int, token_id: int) -> int | None:
        """The node below `node` that holds the token, if there is one."""
        found = np.flatnonzero((self.parents == node) & (self.tokens == token_id))
        return int(found[0]) if len(found) else None


@dataclass(frozen=True)
class DraftBatch:
    """Drafts side by side, the smaller ones padded with nodes that see themselves and the cache, and that nobody sees."""

    tokens: IntArray  # [B, N]
    depths: IntArray  # [B, N]
    mask: BoolArray  # [B, N, N]
    parents: IntArray  # [B, N]
    num_nodes: IntArray  # [B]

    @classmethod
    def of(cls, drafts: Sequence[Draft]) -> DraftBatch:
        """Pad drafts to the size of the largest."""
        batch, width = len(drafts), max(draft.num_nodes for draft in drafts)
        tokens, depths, parents = (np.zeros((batch, width), np.int64) for _ in range(3))
        mask = np.repeat(np.eye(width, dtype=np.bool_)[None], batch, axis=0)
        for row, draft in enumerate(drafts):
            count = draft.num_nodes
            tokens[row, :count], depths[row, :count], parents[row, :count] = draft.tokens, draft.depths, draft.parents
            mask[row, :count, :count] = draft.mask
        return cls(tokens, depths, mask, parents, np.array([draft.num_nodes for draft in drafts], np.int64))


@dataclass(frozen=True)
class CandidateSet:
    """All nodes a tree may be made of, by depth, and the tree's size. Make one with `candidates_for`."""

    num_nodes: int
    parents: IntArray  # [A]
    ranks: IntArray  # [A]
    depths: IntArray  # [A], ascending
    ends: tuple[int, ...]  # ends[d]: how many candidates are at most d deep

    def scores(self, log_probs: FloatArray, max_depth: int) -> FloatArray:
        """Each candidate's log-probability: the sum along its path, as if the heads were independent. [A']

        Args:
            log_probs: the heads', best first. [K, M]
            max_depth: leave out what is deeper, so that A' ≤ A.
        """
        max_depth = min(max_depth, len(self.ends) - 1)
        count = self.ends[max_depth]
        scores = np.zeros(count, np.float32)
        # at most 0, which a logarithm of a probability may miss by rounding: else a child could pass its parent
        scores[1:] = np.minimum(log_probs[self.depths[1:count] - 1, self.ranks[1:count]], 0)
        for start, end in zip(self.ends[1:max_depth], self.ends[2 : max_depth + 1], strict=True):
            scores[start:end] += scores[self.parents[start:end]]
        return scores

    def draft(
        self,
        root_id: int,
        head_ids: IntArray | None,
        scores: FloatArray,
        num_nodes: int,
        lets_pass: Callable[[list[int]], bool] | None = None,
    ) -> Draft:
        """The draft of the `num_nodes` likeliest candidates.

        No child is likelier than its parent, and equal scores keep their order, so what is chosen is a tree.

        Args:
            root_id: the decided token.
            head_ids: the heads' candidates; not needed for a root alone. [K, M]
            scores: from `scores`. [A']
            num_nodes: at most so many, and at most the tree's own size.
            lets_pass: whether a path of tokens below the root may be given out; all may where there is no such function.
        """
        num_nodes = min(num_nodes, self.num_nodes, len(scores))
        tokens = np.full(len(scores), root_id, np.int64)
        if head_ids is not None:
            count = len(scores)
            tokens[1:] = head_ids[self.depths[1:count] - 1, self.ranks[1:count]]
        if num_nodes == len(scores) and lets_pass is None:
            chosen = np.arange(num_nodes)
        else:
            order = np.argsort(-scores, kind="stable")
            chosen = np.sort(order[:num_nodes] if lets_pass is None else self._passing(order, tokens, num_nodes, lets_pass))
        place = np.full(len(scores) + 1, -1)  # the last is the root's parent
        place[chosen] = np.arange(len(chosen))
        parents, depths = place[self.parents[chosen]], self.depths[chosen]
        return Draft(tokens[chosen], parents, depths, _mask(parents, depths))

    def _passing(self, order: IntArray, tokens: IntArray, num_nodes: int, lets_pass: Callable[[list[int]], bool]) -> IntArray:
        """The first candidates of an order that pass, each after its parent."""
        paths: dict[int, list[int]] = {0: []}
        for node in order[1:].tolist():
            if len(paths) == num_nodes:
                break
            if (above := paths.get(int(self.parents[node]))) is not None and lets_pass([*above, int(tokens[node])]):
                paths[node] = [*above, int(tokens[node])]
        return np.array(list(paths), np.int64)


def _mask(parents: IntArray, depths: IntArray) -> BoolArray:  # [N, N], for nodes ordered by depth
    mask = np.eye(len(parents), dtype=np.bool_)
    ends = np.searchsorted(depths, np.arange(1, int(depths[-1]) + 2))
    for start, end in itertools.pairwise(ends.tolist()):
        mask[start:end] |= mask[parents[start:end]]
    return mask


@lru_cache(maxsize=256)
def candidates_for(tree: CandidateTree | DynamicTree, num_heads: int, top_k: int) -> CandidateSet:
    """What a tree may be made of: a static tree's own nodes; for a dynamic one all that can be among its likeliest.

    A candidate of ranks r1 … rd (counted from 1) can be among the N likeliest only if all that are surely at least as likely
    fit as well: its prefixes, each with any smaller ranks, which are r1 + r1·r2 + … + r1·…·rd nodes, and the root.
    """
    if isinstance(tree, DynamicTree):
        whole = CandidateTree.from_choices(_reachable(tree.num_nodes - 1, num_heads, top_k))
        num_nodes = min(tree.num_nodes, whole.num_nodes)
    else:
        whole, num_nodes = _by_depth(tree), tree.num_nodes
    ends = tuple(int((whole.depths <= depth).sum()) for depth in range(whole.depth + 1))
    return CandidateSet(num_nodes, np.array(whole.parents), np.array(whole.ranks), whole.depths, ends)


def _reachable(room: int, num_heads: int, top_k: int) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []

    def extend(path: tuple[int, ...], product: int, used: int) -> None:
        if len(path) == num_heads:
            return
        for rank in range(min(top_k, (room - used) // product)):
            longer = (*path, rank)
            paths.append(longer)
            extend(longer, product * (rank + 1), used + product * (rank + 1))

    extend((), 1, 0)
    return paths


def _by_depth(tree: CandidateTree) -> CandidateTree:
    """The same tree with its nodes ordered by depth."""
    order = np.argsort(tree.depths, kind="stable")
    place = {int(node): position for position, node in enumerate(order)} | {-1: -1}
    return CandidateTree(tuple(place[tree.parents[node]] for node in order), tuple(tree.ranks[node] for node in order))
