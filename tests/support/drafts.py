"""Drafts given by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medusa_runtime import CandidateTree
from medusa_runtime.drafting.draft import Draft


def draft_of(tree: CandidateTree, tokens: Sequence[int]) -> Draft:
    """The draft of a tree whose nodes hold these tokens."""
    return hand_made(tree.parents, tokens, tree.depths.tolist(), tree.mask)


def hand_made(parents: Sequence[int], tokens: Sequence[int], depths: Sequence[int], mask: np.ndarray) -> Draft:
    """A draft whose nodes may have any order, as long as parents come first."""
    count = len(parents)
    draft = Draft(np.array(tokens), np.array(parents), np.array(depths), np.zeros(count, np.float32), np.zeros(count, np.bool_))
    vars(draft)["mask"] = mask  # else it would be made for nodes that are ordered by depth
    return draft
