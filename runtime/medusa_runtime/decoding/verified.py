"""The draft that a step verified, for those who want to see what was guessed and what was right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from medusa_runtime.drafting.draft import Draft
from medusa_runtime.drafting.proposals import HeadGuesses

DraftSource = Literal["model", "head", "ngrams", "lookup", "guide"]
RAISED = 0.01  # nats by which n-grams must have raised a head's guess to be named as its source


@dataclass(frozen=True)
class VerifiedDraft:
    """A tree of guesses that one forward pass verified, node by node. Parents come before their children. N nodes.

    Sources: "model" is the root, which the model itself had decided in the step before. "head" is a guess of the head whose
    number is the node's depth; "ngrams" is one too, which the draft n-grams made likelier. "lookup" was found by prompt
    lookup. "guide" is a token that the request's structure leaves no choice about.
    """

    token_ids: list[int]  # [N]
    parents: list[int]  # [N] the root's is -1
    depths: list[int]  # [N]
    probabilities: list[float]  # [N] that the node and all nodes above it are accepted, as it was thought before the step
    sources: list[DraftSource]  # [N]
    accepted: list[int]  # nodes whose tokens were given out, after the root, which is the first

    @classmethod
    def of(
        cls, draft: Draft, accepted: Sequence[int], guesses: HeadGuesses | None, *, is_forced: bool, has_ngrams: bool
    ) -> Self:
        """Tell a draft.

        Args:
            draft: the draft that was verified.
            accepted: nodes of the accepted path, the root first.
            guesses: the heads' guesses that the draft was made of, if there were any.
            is_forced: whether the request's structure alone said what the draft holds.
            has_ngrams: whether n-grams corrected the guesses.
        """
        sources: list[DraftSource] = ["model"]
        for node in range(1, draft.num_nodes):
            if is_forced:
                sources.append("guide")
            elif draft.looked_up[node]:
                sources.append("lookup")
            else:
                sources.append("ngrams" if has_ngrams and _is_raised(draft, node, guesses) else "head")
        return cls(
            draft.tokens.tolist(),
            draft.parents.tolist(),
            draft.depths.tolist(),
            np.exp(draft.scores).tolist(),
            sources,
            list(accepted),
        )


def _is_raised(draft: Draft, node: int, guesses: HeadGuesses | None) -> bool:
    """Whether a node is likelier in the draft than its head alone found it."""
    assert guesses is not None  # else the node would be looked up or forced
    depth = int(draft.depths[node]) - 1
    [rank] = np.flatnonzero(guesses.token_ids[depth] == draft.tokens[node])[:1]
    corrected = draft.scores[node] - draft.scores[draft.parents[node]]
    return bool(corrected > guesses.log_probs[depth, rank] + RAISED)
