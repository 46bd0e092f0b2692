"""One answer while it is decoded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import FloatArray, TokenBuffer
from medusa_runtime.decoding.checks import DecodingRequest
from medusa_runtime.decoding.stats import DecodingStats, StepCounts
from medusa_runtime.decoding.verified import VerifiedDraft
from medusa_runtime.drafting.draft import Draft
from medusa_runtime.drafting.guide import Guide
from medusa_runtime.drafting.proposals import Drafter, HeadGuesses
from medusa_runtime.sampling.acceptance import Accepted, accept
from medusa_runtime.sampling.distribution import Uniforms, chosen_logprob
from medusa_runtime.sampling.shaping import LogitsShaper

Rows = npt.NDArray[np.floating]  # [N, V]
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, before any of the request's options."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens and their log-probabilities, best first


@dataclass(frozen=True)
class SequenceStep:
    """The tokens that one step decided for one sequence."""

    sequence: int
    token_ids: list[int]  # in order; tokens after an end-of-sequence token or the limit are left out
    num_accepted: int  # drafts among them
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None  # one a token, if the request asked for them
    draft: VerifiedDraft | None = None  # what was verified, if the request asked for it; None for the token after the prompt


class DecodingSequence:
    """One answer: the request and the tokens decided so far. Make one with `DecodingEngine.add`.

    The last token of `tokens` is decided but not cached: it is the root of the next step's draft.

    Args:
        id: unique within its engine.
        request: the checked request.
        tokens: the prompt, to which the answer is appended.
        end_ids: tokens that end the answer.
        drafter: makes its drafts.
        guide: restricts its tokens.
        stream: the number of the answer, if a request has several; the random numbers depend on it.
        since: when the request was made, by `time.perf_counter`.
    """

    def __init__(
        self,
        id: int,  # noqa: A002 - as everybody calls it
        request: DecodingRequest,
        tokens: TokenBuffer,
        *,
        end_ids: frozenset[int],
        drafter: Drafter,
        guide: Guide | None = None,
        stream: int = 0,
        since: float | None = None,
    ) -> None:
        self.id, self.tokens = id, tokens
        self.options, self.max_new_tokens, self.seed = request.options, request.max_new_tokens, request.seed
        self.end_ids, self.drafter, self.guide = end_ids, drafter, guide
        self.shaper = LogitsShaper(request.options, request.prompt_ids, end_ids, guide)
        self.guesses: HeadGuesses | None = None  # the heads', for what follows the root
        self.is_suspect = False  # the heads computed NaN: the next step's logits will say whether the model does, too
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self.stats = DecodingStats()
        self.prompt_logprobs: list[TokenLogprob] = []  # of the prompt's tokens from the second on, as far as they are read
        self.since = time.perf_counter() if since is None else since
        self._stream, self._uniforms = stream, Uniforms(request.seed, stream)
        self._steps: list[SequenceStep] = []
        self.last_step: StepCounts | None = None  # the last verification step
        self._lap_start = self.since  # when the current phase began: waiting, prefill, decoding

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's token ids."""
        return self.tokens.prompt_ids

    @property
    def token_ids(self) -> list[int]:
        """The answer's token ids so far."""
        return self.tokens.answer_ids

    @property
    def num_tokens(self) -> int:
        """How many tokens the answer has so far."""
        return self.tokens.num_answer_tokens

    @property
    def is_finished(self) -> bool:
        """Whether nothing will be decided any more."""
        return self.finish_reason is not None

    @property
    def remaining(self) -> int:
        """Tokens that may still be given out."""
        return self.max_new_tokens - self.num_tokens

    @property
    def num_to_read(self) -> int:
        """How many tokens must be cached before it decodes: the prompt, and all but the last token of an answer begun."""
        return len(self.tokens) - 1 if self.num_tokens else len(self.tokens)

    @property
    def is_scored(self) -> bool:
        """Whether all of the prompt must be read, for its log-probabilities. One of a request's answers is enough for that."""
        return self.options.prompt_logprobs is not None and self._stream == 0 and not self.num_tokens

    @property
    def needs_logits(self) -> bool:
        """Whether a step has to give logits: the model's most likely tokens alone do not decide."""
        asked = self.options.is_sampled or not self.shaper.is_identity or self.options.logprobs is not None
        return asked or self.is_suspect

    @property
    def has_fixed_tree(self) -> bool:
        """Whether the load may not change its tree: the request brought the tree, or the tree changes the answer."""
        return self.options.tree is not None or (self.options.is_sampled and self.options.acceptance == "typical")

    def take_steps(self) -> list[SequenceStep]:
        """The steps that were decided since the last call."""
        steps, self._steps = self._steps, []
        return steps

    def lap(self) -> float:
        """Seconds since the last call, or since the request was made."""
        now = time.perf_counter()
        elapsed, self._lap_start = now - self._lap_start, now
        return elapsed

    def accept_first(self, greedy_id: int, logits: FloatArray | None) -> tuple[Draft, Accepted]:
        """Decide the token that follows the prompt.

        Args:
            greedy_id: the model's most likely token.
            logits: the model's, if `needs_logits`. [V]
        """
        prompt_end = Draft.chain([int(self.tokens.ids[-1])])
        if logits is None or not self.needs_logits:
            return prompt_end, Accepted([0], greedy_id)
        return prompt_end, self.accept(prompt_end, logits[None])

    def accept(self, draft: Draft, logits: Rows) -> Accepted:
        """Accept drafts by the request's options. logits: [N, V]."""
        return accept(draft, _Target(self, draft, logits), self.options)

    def take(
        self, draft: Draft, accepted: Accepted, logits: Rows | None, *, is_forced: bool = False, has_ngrams: bool = False
    ) -> SequenceStep:
        """Give out the accepted tokens, up to the answer's end.

        Args:
            draft: the draft that was verified.
            accepted: its accepted nodes, and the bonus token.
            logits: [N, V], if the request asks for log-probabilities.
            is_forced: whether the guide alone said what the draft holds.
            has_ngrams: whether n-grams corrected the heads' guesses.
        """
        tokens = [*draft.tokens[accepted.nodes[1:]].tolist(), accepted.bonus_id]
        kept = tokens[: self.remaining]
        end = next((place for place, token in enumerate(kept) if token in self.end_ids), None)
        if end is not None:
            kept, self.finish_reason = kept[: end + 1], "stop"
        elif len(kept) == self.remaining:
            self.finish_reason = "length"
        logprobs = None
        if self.options.logprobs is not None:
            assert logits is not None  # `needs_logits`
            rows = zip(accepted.nodes, kept, strict=False)
            logprobs = [token_logprob(logits[row], token, self.options.logprobs) for row, token in rows]
        self.tokens.append(kept)
        if self.guide is not None and not self.is_finished:
            self.guide.advance(kept)
        self.drafter.follow(kept)
        num_accepted = min(len(kept), len(tokens) - 1)
        verified = None
        if self.options.drafts and self.num_tokens > len(kept):  # the first token follows the prompt, not a draft
            nodes = accepted.nodes[: 1 + num_accepted]
            verified = VerifiedDraft.of(draft, nodes, self.guesses, is_forced=is_forced, has_ngrams=has_ngrams)
        step = SequenceStep(self.id, kept, num_accepted, self.finish_reason, logprobs, verified)
        self._steps.append(step)
        return step

    def finish(self, reason: FinishReason, error: BaseException | None = None) -> None:
        """End early."""
        if not self.is_finished:
            self.finish_reason, self.error = reason, error
            self._steps.append(SequenceStep(self.id, [], 0, reason))

    def drop_last(self, count: int) -> StepCounts:
        """Take back the last `count` tokens of the last step. Returns the step as it was counted, with these tokens."""
        assert self.last_step is not None  # the token after the prompt is alone in its step, and is never taken back
        self.tokens.drop_last(count)
        step, self.last_step = self.last_step, self.last_step.without_last(count)
        return step

    def uniform(self, depth: int) -> float:
        """The random number of the token that follows a node of that depth."""
        return self._uniforms[self.num_tokens + depth]


class _Target:
    """The model's results after the nodes of a draft; see `acceptance.Target`.

    Args:
        sequence: the draft's sequence.
        draft: the draft that was verified.
        rows: the model's logits after each node. [N, V]
    """

    def __init__(self, sequence: DecodingSequence, draft: Draft, rows: Rows) -> None:
        self._sequence, self._draft, self._rows = sequence, draft, rows
        self._answer_ids = [] if sequence.shaper.is_identity else sequence.token_ids

    def logits(self, path: Sequence[int]) -> FloatArray:
        row: FloatArray = self._rows[path[-1]].astype(np.float32, copy=False)
        if self._sequence.shaper.is_identity:
            return row
        path_ids = self._draft.tokens[list(path[1:])].tolist()
        return self._sequence.shaper.shape(row, [*self._answer_ids, *path_ids], path_ids)

    def uniform(self, depth: int) -> float:
        return self._sequence.uniform(depth)

    def ends_at(self, token_id: int) -> bool:
        return token_id in self._sequence.end_ids


def token_logprob(logits: FloatArray, token_id: int, count: int) -> TokenLogprob:
    """A token's log-probability with those of the `count` likeliest tokens. logits: as the model gave them. [V]"""
    return TokenLogprob(token_id, *chosen_logprob(logits, token_id, count))
