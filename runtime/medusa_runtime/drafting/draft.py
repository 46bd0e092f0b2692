"""Drafts: the tokens of each sequence that one step verifies, and their batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medusa_runtime.arrays import BoolArray, IntArray


@dataclass(frozen=True)
class Draft:
    """The tokens of one sequence that a step verifies. Node 0 is the root; parents come before their children."""

    tokens: IntArray  # [N]
    parents: IntArray  # [N], the root's is -1
    depths: IntArray  # [N]
    mask: BoolArray  # [N, N], as `CandidateTree.mask`
    looked_up: BoolArray | None = None  # [N] whether a prompt lookup named it; none where none could

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
