"""Shaping logits: a request's penalties, biases, bans and grammar, applied before the temperature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medusa_runtime.arrays import FloatArray
from medusa_runtime.drafting.guide import Guide
from medusa_runtime.errors import OptionError
from medusa_runtime.options import DecodingOptions
from medusa_runtime.sampling.distribution import largest


class LogitsShaper:
    """Penalties, biases and bans: the changes of logits that come before the temperature.

    Args:
        options: the request's options.
        prompt_ids: the prompt's token ids.
        end_ids: the tokens that end the answer. They are banned before `min_new_tokens`.
        guide: the request's grammar.
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
        self._suppressed_ids = np.array(options.suppress_tokens, np.int64)
        self._suppressed_first_ids = np.array(options.begin_suppress_tokens, np.int64)

    @property
    def is_identity(self) -> bool:
        """Whether it never changes any logit."""
        options = self._options
        banned = options.suppress_tokens or options.begin_suppress_tokens or options.min_new_tokens
        return not (options.has_penalties or banned or len(self._bias_ids) or self._guide)

    def shape(self, logits: FloatArray, token_ids: Sequence[int], path: Sequence[int] = ()) -> FloatArray:
        """The logits of the next token, changed by the options. The argument is not changed.

        Args:
            logits: the model's. [V]
            token_ids: the answer's tokens before the next one, those of `path` included.
            path: the last of these tokens that are drafts; the guide stands before them.

        Raises:
            OptionError: the options leave no token, or make a logit infinite.
            BackendError: the model's largest logit is NaN or infinite.
        """
        if self.is_identity:
            return logits
        largest(logits)
        options, shaped = self._options, logits.astype(np.float32)
        if options.has_penalties:
            self._penalize(shaped, token_ids)
        shaped[self._bias_ids] += self._biases
        shaped[self._suppressed_ids] = -np.inf
        if not token_ids:
            shaped[self._suppressed_first_ids] = -np.inf
        if len(token_ids) < options.min_new_tokens:
            shaped[self._end_ids] = -np.inf
        if self._guide is not None:
            shaped[~self._guide.allowed(path)] = -np.inf
        best = shaped.max()
        if best == -np.inf:
            raise OptionError("the options leave no token that may come next")
        if not np.isfinite(best):
            raise OptionError(f"the options make a logit {best}; choose a repetition_penalty nearer to 1")
        return shaped

    def _penalize(self, logits: FloatArray, token_ids: Sequence[int]) -> None:
        options = self._options
        given, counts = np.unique(np.array(token_ids, np.int64), return_counts=True)
        if options.repetition_penalty != 1.0:
            seen = np.union1d(self._prompt_ids, given)
            found = logits[seen]
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # `shape` checks the result
                logits[seen] = np.where(found > 0, found / options.repetition_penalty, found * options.repetition_penalty)
        logits[given] -= options.presence_penalty + options.frequency_penalty * counts
