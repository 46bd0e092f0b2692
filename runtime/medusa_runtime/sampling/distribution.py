"""From shaped logits to tokens: temperature, truncation, and a draw with one random number per token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medusa_runtime.arrays import FloatArray, IntArray
from medusa_runtime.errors import BackendError
from medusa_runtime.options import DecodingOptions

SMALLEST = np.finfo(np.float32).tiny
BLOCK = 256  # tokens; a draw first finds the block by the blocks' sums, then the token in it


class Uniforms:
    """One number in [0, 1) for each token of an answer, by a counter-based generator.

    The number of the i-th token depends only on the seed and on i. So a step draws the same token from the same distribution
    if it is repeated, has another tree, or is done in another batch.

    Args:
        seed: 64 bits.
        stream: which of the answers to one request.
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))
        self._drawn: list[float] = []

    def __getitem__(self, place: int) -> float:
        while place >= len(self._drawn):
            self._drawn += self._generator.random(64).tolist()
        return self._drawn[place]


@dataclass(frozen=True)
class Distribution:
    """Weights of tokens, in the order of their ids; they need not sum to 1."""

    weights: FloatArray  # [S]
    token_ids: IntArray | None = None  # [S], ascending; None if S is the whole vocabulary

    def draw(self, uniform: float) -> int:
        """The token in which the cumulative probability passes `uniform`: inversion, for a number in [0, 1)."""
        sums = np.add.reduceat(self.weights, np.arange(0, len(self.weights), BLOCK), dtype=np.float64)
        ends = np.cumsum(sums)
        target = uniform * ends[-1]
        block = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
        start = block * BLOCK
        inner = np.cumsum(self.weights[start : start + BLOCK], dtype=np.float64) + (ends[block] - sums[block])
        place = start + min(int(np.searchsorted(inner, target, side="right")), len(inner) - 1)
        while self.weights[place] == 0:  # rounding may pass the last token that has a weight
            place -= 1
        return place if self.token_ids is None else int(self.token_ids[place])

    def probabilities(self) -> FloatArray:
        """The weights, normalised so that they sum to 1. [S]"""
        normalised: FloatArray = (self.weights / self.weights.sum(dtype=np.float64)).astype(np.float32)
        return normalised

    def weight(self, token_id: int) -> float:
        """The weight of one token; 0 if the options leave it out."""
        if self.token_ids is None:
            return float(self.weights[token_id])
        place = int(np.searchsorted(self.token_ids, token_id))
        return float(self.weights[place]) if place < len(self.token_ids) and self.token_ids[place] == token_id else 0.0


def largest(logits: FloatArray) -> float:
    """The largest of a model's logits. NaN counts as larger than any number.

    Raises:
        BackendError: it is NaN or infinite, so no token can be chosen.
    """
    best = float(logits.max())
    if not np.isfinite(best):
        raise BackendError(f"the model's largest logit is {best}: no token can be chosen; compare: medusa-export validate")
    return best


def distribution(logits: FloatArray, options: DecodingOptions) -> Distribution:
    """The distribution that a token is drawn from: temperature, then top-k, top-p and min-p, in the usual order.

    Args:
        logits: shaped. [V]
        options: with a temperature above 0.

    Raises:
        BackendError: the largest logit is NaN or infinite.
    """
    best = largest(logits)
    with np.errstate(over="ignore"):  # an overflow gives minus infinity, whose weight is 0
        weights = np.exp((logits - best) / max(np.float32(options.temperature), SMALLEST))  # [V], 1 for the best token
    if not (options.top_k or options.top_p < 1 or options.min_p):
        return Distribution(weights)
    kept: IntArray | slice = slice(None)
    if 0 < options.top_k < len(weights):
        kept = np.sort(np.argpartition(-weights, options.top_k - 1)[: options.top_k])
    if options.top_p < 1:
        nucleus = _nucleus(weights[kept], options.top_p)
        kept = nucleus if isinstance(kept, slice) else kept[nucleus]
    if options.min_p:
        likely = np.flatnonzero(weights[kept] >= options.min_p)
        kept = likely if isinstance(kept, slice) else kept[likely]
    return Distribution(weights[kept], None if isinstance(kept, slice) else kept)


def _nucleus(weights: FloatArray, top_p: float) -> IntArray:
    """The fewest places that together have `top_p` of all weight, ascending.

    Places with less than (1 - top_p) of the mean weight have less than 1 - top_p of all weight together, so none of them is
    needed. Only the other places, usually few, are sorted.
    """
    total = float(weights.sum(dtype=np.float64))
    needed = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    order = needed[np.argsort(-weights[needed], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), top_p * total)) + 1
    return np.sort(order[:count])


def chosen_logprob(logits: FloatArray, token_id: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The model's own log-probability of a token, and the `count` likeliest tokens with theirs, before any option.

    Args:
        logits: as the model gave them. [V]
        token_id: the token that was given out.
        count: how many likely tokens to return, best first.

    Raises:
        BackendError: the largest logit is NaN or infinite.
    """
    logits = logits.astype(np.float32, copy=False)
    best = largest(logits)
    total = best + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))
    count = min(count, len(logits))
    top = np.argpartition(-logits, count - 1)[:count] if count else np.empty(0, np.int64)
    top = top[np.argsort(-logits[top], kind="stable")]
    return float(logits[token_id]) - total, [(int(token), float(logits[token]) - total) for token in top]
