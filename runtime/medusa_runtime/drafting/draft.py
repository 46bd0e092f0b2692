"""Drafts: trees of tokens that may follow a decided token. A step verifies one draft of each sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from medusa_runtime.arrays import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Draft:
    """A tree of tokens. Node 0 is the root, which is decided already; parents come before their children.

    A sequence's *proposals* are a large draft: all tokens that may follow its root. `likeliest` takes from it the small
    one that a step verifies. No child is likelier than its parent.
    """

    tokens: IntArray  # [N]
    parents: IntArray  # [N], the root's is -1
    depths: IntArray  # [N]
    scores: FloatArray  # [N] log-probability that the node and all nodes above it are accepted
    looked_up: BoolArray  # [N] whether prompt lookup named the node

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Draft:
        """A root and tokens that follow it one after the other, each of them certain."""
        count = len(tokens)
        certain, not_looked_up = np.zeros(count, np.float32), np.zeros(count, np.bool_)
        return cls(np.array(tokens), np.arange(-1, count - 1), np.arange(count), certain, not_looked_up)

    @property
    def num_nodes(self) -> int:
        """The number of nodes, the root included."""
        return len(self.tokens)

    @cached_property
    def mask(self) -> BoolArray:
        """``mask[i, j]``: node i attends to node j, because j is i or an ancestor. The nodes are ordered by depth. [N, N]"""
        mask = _identity(self.num_nodes)
        if self.num_nodes > 1:
            mask = mask.copy()
            for start, end in itertools.pairwise(depth_ends(self.depths)):
                mask[start:end] |= mask[self.parents[start:end]]
        return mask

    def children(self, node: int) -> IntArray:
        """The nodes below a node."""
        return np.flatnonzero(self.parents == node)

    def child(self, node: int, token_id: int) -> int | None:
        """The node below `node` that holds the token, if there is one."""
        found = np.flatnonzero((self.parents == node) & (self.tokens == token_id))
        return int(found[0]) if len(found) else None

    def chances(self, num_nodes: int) -> FloatArray:
        """Probabilities of the drafts in `likeliest(num_nodes)`, likeliest first."""
        return likeliest_chances(self.scores, num_nodes)

    def likeliest(self, num_nodes: int, lets_pass: Callable[[list[int]], bool] | None = None) -> Draft:
        """The draft of the `num_nodes` likeliest nodes, ordered by depth; of all nodes if there are fewer.

        Nodes of equal score keep their order, so the nodes chosen form a tree.

        Args:
            num_nodes: the largest size of the draft.
            lets_pass: whether a path of tokens below the root may be given out; without this function all paths may.
        """
        if self.num_nodes == 1:
            return self
        order = np.argsort(-self.scores, kind="stable")
        chosen = np.sort(order[:num_nodes] if lets_pass is None else self._passing(order, num_nodes, lets_pass))
        chosen = chosen[np.argsort(self.depths[chosen], kind="stable")]
        place = np.full(self.num_nodes + 1, -1)  # the last entry stands for the root's parent
        place[chosen] = np.arange(len(chosen))
        return Draft(
            self.tokens[chosen],
            place[self.parents[chosen]],
            self.depths[chosen],
            self.scores[chosen],
            self.looked_up[chosen],
        )

    def _passing(self, order: IntArray, num_nodes: int, lets_pass: Callable[[list[int]], bool]) -> IntArray:
        """The first nodes of an order whose paths pass. A node passes only if its parent does."""
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
class DraftBatch:
    """Drafts side by side. Smaller ones are padded. A padding node attends to itself and the cache; no other attends to it."""

    tokens: IntArray  # [B, N]
    depths: IntArray  # [B, N]
    mask: BoolArray  # [B, N, N]
    parents: IntArray  # [B, N]
    num_nodes: IntArray  # [B]

    @classmethod
    def of(cls, drafts: Sequence[Draft]) -> DraftBatch:
        """Pad drafts to the size of the largest."""
        if len(drafts) == 1:
            one = drafts[0]
            num_nodes = np.array([one.num_nodes], np.int64)
            return cls(one.tokens[None], one.depths[None], one.mask[None], one.parents[None], num_nodes)
        batch, width = len(drafts), max(draft.num_nodes for draft in drafts)
        tokens, depths, parents = (np.zeros((batch, width), np.int64) for _ in range(3))
        mask = np.repeat(np.eye(width, dtype=np.bool_)[None], batch, axis=0)
        for row, draft in enumerate(drafts):
            count = draft.num_nodes
            tokens[row, :count], depths[row, :count], parents[row, :count] = draft.tokens, draft.depths, draft.parents
            mask[row, :count, :count] = draft.mask
        return cls(tokens, depths, mask, parents, np.array([draft.num_nodes for draft in drafts], np.int64))

    @property
    def width(self) -> int:
        """N: nodes of each draft, padding included."""
        return int(self.tokens.shape[1])


@lru_cache(maxsize=64)
def _identity(size: int) -> BoolArray:
    """An identity matrix, which nobody may change. [size, size]"""
    identity = np.eye(size, dtype=np.bool_)
    identity.flags.writeable = False
    return identity


def depth_ends(depths: IntArray) -> list[int]:
    """For nodes ordered by depth: how many are at most 0, 1 … deep."""
    ends: list[int] = np.searchsorted(depths, np.arange(1, int(depths[-1]) + 2)).tolist()
    return ends


def likeliest_chances(scores: FloatArray, num_nodes: int) -> FloatArray:
    """Probabilities of the drafts of a tree of the `num_nodes` likeliest nodes, likeliest first. scores: `Draft.scores`."""
    chances: FloatArray = np.exp(np.sort(scores[1:])[::-1][: num_nodes - 1])
    return chances
