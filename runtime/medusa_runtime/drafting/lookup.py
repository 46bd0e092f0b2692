"""Prompt lookup: drafts from what followed the same words earlier, in the prompt or in the answer so far.

Summaries, edits and quotations repeat what they are made of. Where the last tokens of a sequence occurred before, what came
after them then is a guess at what comes now, of any length and for next to no time.

Source: Saxena, "Prompt Lookup Decoding", 2023; Yang et al., "Inference with Reference: Lossless Acceleration of Large Language
Models", 2023. How likely a guess is, learned as the answer grows, so that it competes with other drafts, is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medusa_runtime.arrays import IntArray

LONGEST_MATCH = 8  # tokens; a longer one is as good as one of this length
MAX_CONTINUATIONS = 3
DECAY = 0.95  # how much of what was learnt from earlier guesses remains after one more
PRIOR_WEIGHT = 4.0  # guesses that the prior counts for
# A bundle's answers (docs/decisions/0017) showed 0.2 … 0.4, 0.5 … 0.65, 0.6 … 0.8 for 1, 2, 3 tokens, and 0.9 and more for 8.
PRIOR = tuple(1 - 0.75**length for length in range(1, LONGEST_MATCH + 1))
PRIOR_OF_OTHERS = 0.15


@dataclass(frozen=True)
class Continuation:
    """Tokens that may come next, and how likely each of them is where those before it are right."""

    token_ids: list[int]
    chances: list[float]


class PromptLookup:
    """What followed the last tokens of one sequence, where they occurred before.

    A continuation's chance to be right depends on how many tokens before it matched, and it is learned for each such length:
    each token that is decided shows whether the continuation was right so far, and a token that was makes the match longer.

    Finding matches is one comparison over all tokens and a few over what it leaves, so there is no index to be kept.

    Args:
        prompt_ids: what the sequence begins with.
        max_new_tokens: how many tokens may be added.
    """

    def __init__(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        self._room = np.empty(len(prompt_ids) + max_new_tokens, np.int32)
        self._room[: len(prompt_ids)] = prompt_ids
        self._length = len(prompt_ids)
        self._rates = [_Rate(prior) for prior in PRIOR]  # by the length of the match, from 1
        self._others = _Rate(PRIOR_OF_OTHERS)  # of any other continuation, where the first was wrong
        self._asked: list[tuple[int, Continuation]] = []  # the lengths of their matches, and what was said

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens that were decided, and learn what the last continuations were worth."""
        if self._asked and token_ids:
            self._learn(token_ids)
        self._asked = []
        self._room[self._length : self._length + len(token_ids)] = token_ids
        self._length += len(token_ids)

    def continuations(self, depth: int) -> list[Continuation]:
        """What may come next, best first: of the longest matches the latest, each with another first token.

        Args:
            depth: tokens of each.
        """
        self._asked, left = [], 1.0
        rates = [rate.value for rate in self._rates]
        rates += rates[-1:] * depth  # rates[n - 1] for a match of n tokens
        for length, end in self._matches() if depth > 0 else ():
            chance = left * (self._others.value if self._asked else rates[length - 1])
            left -= chance
            following = self._room[end + 1 : min(end + 1 + depth, self._length)]
            token_ids = np.resize(following, depth).tolist()  # what reaches the end repeats itself, as it did
            self._asked.append((length, Continuation(token_ids, [chance, *rates[length : length + depth - 1]])))
        return [continuation for _, continuation in self._asked]

    def _matches(self) -> Iterator[tuple[int, int]]:
        """Lengths of matches and the places of their last tokens, at most `MAX_CONTINUATIONS`, no two with one next token."""
        tokens = self._room[: self._length]
        ends = np.flatnonzero(tokens[:-1] == tokens[-1])
        by_length: list[IntArray] = []  # by_length[n]: ends of matches of more than n tokens, ascending
        while len(ends) and len(by_length) < LONGEST_MATCH:
            by_length.append(ends)
            back = len(by_length)
            ends = ends[np.searchsorted(ends, back) :]
            if len(ends):
                ends = ends[tokens[ends - back] == tokens[-1 - back]]
        found: list[int] = []  # the next tokens
        for length in range(len(by_length), 0, -1):
            ends = by_length[length - 1]
            while len(found) < MAX_CONTINUATIONS:
                for token in found:
                    ends = ends[tokens[ends + 1] != token]
                if not len(ends):
                    break
                found.append(int(tokens[ends[-1] + 1]))
                yield length, int(ends[-1])

    def _learn(self, decided: Sequence[int]) -> None:
        [(length, first), *others] = self._asked
        for place, (guess, token) in enumerate(zip(first.token_ids, decided, strict=False)):
            self._rates[min(length + place, LONGEST_MATCH) - 1].count(is_right=guess == token)
            if guess != token:
                break
        if first.token_ids[0] == decided[0]:
            return
        for _, other in others:
            self._others.count(is_right=other.token_ids[0] == decided[0])
            if other.token_ids[0] == decided[0]:
                return


class _Rate:
    """How often something is right: the mean of a Beta distribution whose counts decay to its prior."""

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._right = self._seen = 0.0

    @property
    def value(self) -> float:
        return (self._prior * PRIOR_WEIGHT + self._right) / (PRIOR_WEIGHT + self._seen)

    def count(self, *, is_right: bool) -> None:
        self._right, self._seen = DECAY * self._right + is_right, DECAY * self._seen + 1
