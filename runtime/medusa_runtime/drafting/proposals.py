"""Drafts: which candidate tokens a step verifies, chosen for each sequence from what its heads and its prompt lookup say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from medusa_runtime.arrays import BoolArray, FloatArray, IntArray
from medusa_runtime.drafting.draft import Draft
from medusa_runtime.drafting.lookup import Continuation
from medusa_runtime.drafting.ngrams import Growth, NGrams
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree


@dataclass(frozen=True)
class Candidates:
    """What a sequence's next draft may hold: the root, and tokens below it. Parents come before their children.

    No child is likelier than its parent.
    """

    tokens: IntArray  # [A]
    parents: IntArray  # [A], the root's is -1
    depths: IntArray  # [A]
    scores: FloatArray  # [A] log-probability of being accepted
    looked_up: BoolArray  # [A] whether a prompt lookup named it

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Candidates:
        """The root, and tokens that follow it one after the other for certain."""
        count = len(tokens)
        certain, unnamed = np.zeros(count, np.float32), np.zeros(count, np.bool_)
        return cls(np.array(tokens), np.arange(-1, count - 1), np.arange(count), certain, unnamed)

    def draft(self, num_nodes: int, lets_pass: Callable[[list[int]], bool] | None = None) -> Draft:
        """The draft of the `num_nodes` likeliest of them, or of all, where there are fewer.

        Equal scores keep their order, so what is chosen is a tree.

        Args:
            num_nodes: at most so many.
            lets_pass: whether a path of tokens below the root may be given out; all may where there is no such function.
        """
        if len(self.tokens) == 1:
            return Draft(self.tokens, self.parents, self.depths, np.ones((1, 1), np.bool_), self.looked_up)
        order = np.argsort(-self.scores, kind="stable")
        chosen = np.sort(order[:num_nodes] if lets_pass is None else self._passing(order, num_nodes, lets_pass))
        chosen = chosen[np.argsort(self.depths[chosen], kind="stable")]
        place = np.full(len(self.tokens) + 1, -1)  # the last is the root's parent
        place[chosen] = np.arange(len(chosen))
        parents, depths = place[self.parents[chosen]], self.depths[chosen]
        return Draft(self.tokens[chosen], parents, depths, _mask(parents, depths), self.looked_up[chosen])

    def _passing(self, order: IntArray, num_nodes: int, lets_pass: Callable[[list[int]], bool]) -> IntArray:
        """The first candidates of an order that pass, each after its parent."""
        paths: dict[int, list[int]] = {0: []}
        for node in order[1:].tolist():
            if len(paths) == num_nodes:
                break
            if (above := paths.get(int(self.parents[node]))) is not None:
                path = [*above, int(self.tokens[node])]
                if lets_pass(path):
                    paths[node] = path
        return np.array(list(paths), np.int64)


@dataclass(frozen=True)
class CandidateSet:
    """The places that a tree of the heads' candidates may be made of, by depth. Make one with `candidates_for`."""

    num_nodes: int  # the tree's size
    parents: IntArray  # [A]
    ranks: IntArray  # [A]
    depths: IntArray  # [A], ascending
    ends: tuple[int, ...]  # ends[d]: how many candidates are at most d deep
    ngrams: NGrams | None = None  # with which the tree is made of what they find likeliest, not of these places

    def candidates(
        self,
        root_id: int,
        head_ids: IntArray | None,
        head_log_probs: FloatArray | None,
        max_depth: int,
        continuations: Sequence[Continuation] = (),
        previous_id: int | None = None,
    ) -> Candidates:
        """What may follow a root by the heads and by prompt lookup.

        A node's probability is the product along its path, as if heads and continuations were independent, but for what
        n-grams say of the heads' candidates. Where both name a token, it has the larger of its probabilities.

        Args:
            root_id: the decided token.
            head_ids: the heads' candidates, best first; none where the heads were not asked. [K, M]
            head_log_probs: theirs. [K, M]
            max_depth: leave out what is deeper.
            continuations: from `PromptLookup.continuations`.
            previous_id: the decided token before the root, for the n-grams.
        """
        tokens, parents, depths, log_probs = self._guesses(root_id, previous_id, head_ids, head_log_probs, max_depth)
        looked_up = np.zeros(len(tokens), np.bool_)
        added = _merge(continuations, tokens, parents, log_probs, looked_up)
        for start, end in itertools.pairwise(_ends(depths)):
            log_probs[start:end] += log_probs[parents[start:end]]
        if not added:
            return Candidates(tokens, parents, depths, log_probs, looked_up)
        scores = log_probs.tolist()
        for node in added:
            scores.append(scores[node.parent] + node.log_prob)
        return Candidates(
            np.append(tokens, [node.token_id for node in added]),
            np.append(parents, [node.parent for node in added]),
            np.append(depths, [node.depth for node in added]),
            np.array(scores, np.float32),
            np.append(looked_up, np.ones(len(added), np.bool_)),
        )

    def _guesses(
        self,
        root_id: int,
        previous_id: int | None,
        head_ids: IntArray | None,
        head_log_probs: FloatArray | None,
        max_depth: int,
    ) -> Growth:
        """What the heads say, by depth."""
        max_depth = min(max_depth, len(self.ends) - 1)
        if head_ids is None or head_log_probs is None:
            max_depth = 0
        elif self.ngrams is not None:
            last_ids = (root_id if previous_id is None else previous_id, root_id)
            return self.ngrams.grow(last_ids, head_ids, head_log_probs, self.num_nodes, max_depth)
        count = self.ends[max_depth]
        tokens, log_probs = np.full(count, root_id, np.int64), np.zeros(count, np.float32)
        if head_ids is not None and head_log_probs is not None:
            places = self.depths[1:count] - 1, self.ranks[1:count]
            tokens[1:] = head_ids[places]
            # at most 0, which a logarithm of a probability may miss by rounding: else a child could pass its parent
            log_probs[1:] = np.minimum(head_log_probs[places], 0)
        return Growth(tokens, self.parents[:count], self.depths[:count], log_probs)


class _Added(NamedTuple):
    """A token that only a continuation names."""

    token_id: int
    parent: int
    depth: int
    log_prob: float


def _merge(
    continuations: Sequence[Continuation], tokens: IntArray, parents: IntArray, log_probs: FloatArray, looked_up: BoolArray
) -> list[_Added]:
    """Find the candidates that continuations name as well, and raise them. Returns what no candidate holds, to follow them."""
    added: list[_Added] = []
    for continuation in continuations:
        node = 0
        for depth, (token_id, chance) in enumerate(zip(continuation.token_ids, continuation.chances, strict=True), start=1):
            log_prob = math.log(chance)
            if node < len(tokens) and len(same := np.flatnonzero((parents == node) & (tokens == token_id))):
                node = int(same[0])
                log_probs[node], looked_up[node] = max(log_probs[node], log_prob), True
            else:
                added.append(_Added(token_id, node, depth, log_prob))
                node = len(tokens) + len(added) - 1
    return added


def _mask(parents: IntArray, depths: IntArray) -> BoolArray:  # [N, N], for nodes ordered by depth
    mask = np.eye(len(parents), dtype=np.bool_)
    for start, end in itertools.pairwise(_ends(depths)):
        mask[start:end] |= mask[parents[start:end]]
    return mask


def _ends(depths: IntArray) -> list[int]:
    """How many nodes are at most 0, 1 … deep, of nodes ordered by depth."""
    ends: list[int] = np.searchsorted(depths, np.arange(1, int(depths[-1]) + 2)).tolist()
    return ends


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
