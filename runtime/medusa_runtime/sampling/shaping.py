"""From logits to tokens: what a request's options make of the model's distribution, and drawing from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medusa_runtime.arrays import FloatArray
from medusa_runtime.drafting.guide import Guide
from medusa_runtime.errors import OptionError
from medusa_runtime.options import DecodingOptions


class LogitsShaper:
    """Penalties, biases, bans: everything that changes logits before a temperature does.

    Args:
        options: the request's.
        prompt_ids: its prompt.
        end_ids: the tokens that end the answer, banned before `min_new_tokens`.
        guide: its grammar.
    """

    def __init__(
        self, options: DecodingOptions, prompt_ids: Sequence[int], end_ids: frozenset[int], guide: Guide | None = None
    ) -> None:
        self._options = options
        self._guide = guide
        self._prompt_ids = np.unique(np.array(prompt_ids, np.int64))
        self._end_ids = np.array(sorted(end_ids), np.int64)
        self._bias_ids = np.array(list(options.logit_bias), np.int64)
        self._biases = np.array(list(options.logit_bias.values()), np.float32)

    @property
    def is_identity(self) -> bool:
        """Whether it never changes anything."""
        options = self._options
        return not (options.has_penalties or options.min_new_tokens or len(self._bias_ids) or self._guide)

    def shape(self, logits: FloatArray, token_ids: Sequence[int], path: Sequence[int] = ()) -> FloatArray:
        """The logits [V] of what follows an answer's tokens, changed as the options want; the argument stays as it is.

        Raises:
            OptionError: nothing may follow.
        """
        if self.is_identity:
            return logits
        options, shaped = self._options, logits.astype(np.float32)
        if options.has_penalties:
            self._penalize(shaped, token_ids)
        shaped[self._bias_ids] += self._biases
        if len(token_ids) < options.min_new_tokens:
            shaped[self._end_ids] = -np.inf
        if self._guide is not None:
            shaped[~self._guide.allowed(path)] = -np.inf
        if shaped.max() == -np.inf:
            raise OptionError("the options leave no token that may come next")
        return shaped

    def _penalize(self, logits: FloatArray, token_ids: Sequence[int]) -> None:
        options = self._options
        given, counts = np.unique(np.array(token_ids, np.int64), return_counts=True)
        if options.repetition_penalty != 1.0:
            seen = np.union1d(self._prompt_ids, given)
            found = logits[seen]
            logits[seen] = np.where(found > 0, found / options.repetition_penalty, found * options.repetition_penalty)
        logits[given] -= options.presence_penalty + options.frequency_penalty * counts
