"""Prompt lookup: drafts of the tokens that followed the same tokens earlier, in the prompt or in the answer so far.

Summaries, edits and quotations repeat their source. If the last tokens of a sequence occurred before, the tokens that came
after them then are a guess at the next ones. Such a guess can have any length and costs next to no time.

Source: Saxena, "Prompt Lookup Decoding", 2023; Yang et al., "Inference with Reference: Lossless Acceleration of Large Language
Models", 2023. Our addition: the probability of a guess is learned as the answer grows, so that it competes with other drafts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medusa_runtime.arrays import IntArray, TokenBuffer

LONGEST_MATCH = 8  # tokens; longer matches are as good as those of this length
MAX_CONTINUATIONS = 3
GUESS_DECAY = 0.95  # the weight of earlier guesses after one more
PRIOR_WEIGHT = 4.0  # the number of guesses that the prior is worth
# A bundle's answers (docs/decisions/0017) showed 0.2 … 0.4, 0.5 … 0.65, 0.6 … 0.8 for 1, 2, 3 tokens, and 0.9 and more for 8.
RATE_PRIOR = tuple(1 - 0.75**length for length in range(1, LONGEST_MATCH + 1))
PRIOR_OF_OTHERS = 0.15


@dataclass(frozen=True)
class Continuation:
    """Tokens that may come next, and how likely each of them is if those before it are right."""

    token_ids: list[int]
    chances: list[float]


class PromptLookup:
    """Finds earlier places where the last tokens of one sequence occurred, and the tokens that followed there.

    The probability of a continuation depends on how many tokens before it matched, and is learned for each such length. Each
    decided token shows whether the continuation was right so far; if it was, the match is one token longer.

    Finding matches takes one comparison over all tokens and a few over the places that it leaves, so no index is kept.

    Args:
        tokens: the sequence's tokens, which grow; no copy is kept.
    """

    def __init__(self, tokens: TokenBuffer) -> None:
        self._tokens = tokens
        self._rates = [_Rate(prior) for prior in RATE_PRIOR]  # by the length of the match, from 1
        self._others = _Rate(PRIOR_OF_OTHERS)  # of any other continuation, if the first was wrong
        self._asked: list[tuple[int, Continuation]] = []  # the last continuations, each with the length of its match

    def learn(self, decided: Sequence[int]) -> None:
        """Compare the last continuations with the tokens that were decided since then, and learn their rates."""
        if self._asked and decided:
            self._count(decided)
        self._asked = []

    def continuations(self, depth: int) -> list[Continuation]:
        """Tokens that may come next, best first: from the latest of the longest matches, each with another first token.

        Args:
            depth: the number of tokens of each.
        """
        self._asked, left = [], 1.0
        rates = [rate.value for rate in self._rates]
        rates += rates[-1:] * depth  # rates[n - 1] for a match of n tokens
        for length, end in self._matches() if depth > 0 else ():
            chance = left * (self._others.value if self._asked else rates[length - 1])
            left -= chance
            token_ids = self._tokens.ids[end + 1 : end + 1 + depth].tolist()
            if len(token_ids) < depth:  # a continuation that reaches the end repeats
                token_ids = list(itertools.islice(itertools.cycle(token_ids), depth))
            self._asked.append((length, Continuation(token_ids, [chance, *rates[length : length + depth - 1]])))
        return [continuation for _, continuation in self._asked]

    def _matches(self) -> Iterator[tuple[int, int]]:
        """Lengths of matches and the places of their last tokens, at most `MAX_CONTINUATIONS`, no two with one next token."""
        tokens = self._tokens.ids
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

    def _count(self, decided: Sequence[int]) -> None:
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
        self._right, self._seen = GUESS_DECAY * self._right + is_right, GUESS_DECAY * self._seen + 1
