"""One answer of a request: its tokens become text, and stop texts end it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from medusa_runtime.decoding.sequence import DecodingSequence, FinishReason, SequenceStep, TokenLogprob
from medusa_runtime.service.results import Choice, GenerationChunk
from medusa_runtime.text.codec import TextCodec, WithSpecialTokens
from medusa_runtime.text.stream import StopStrings, TextStream


class Answer:
    """The text of one answer. Its token ids are its sequence's.

    Args:
        index: which of the request's answers.
        codec: turns tokens into text.
        stop: texts that end it.
        special_stops: special tokens that end it, each with its stop text. Decoding leaves special tokens out of the text.
        with_logprobs: whether the request asked for log-probabilities.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self,
        index: int,
        codec: TextCodec,
        *,
        stop: Sequence[str] = (),
        special_stops: Mapping[int, str] | None = None,
        with_logprobs: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self.index = index
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.sequence: DecodingSequence | None = None
        self.is_counted = True  # among those under way
        self._logprobs: list[TokenLogprob] | None = [] if with_logprobs else None
        self._special_stops = special_stops or {}
        self._stream = TextStream(codec if skip_special_tokens else WithSpecialTokens(codec))
        self._stops = StopStrings(stop)
        self._one_by_one = bool(stop)  # a stop text may end within a step

    def push(self, step: SequenceStep) -> GenerationChunk | None:
        """Take a step's tokens. Returns None if the answer had ended before."""
        if self.finish_reason is not None:
            return None
        visible = step.token_ids
        if step.finish_reason == "stop":  # the token that ends the answer is no part of its text
            visible = visible[:-1]
        text, taken, stop = "", 0, None
        for piece in [[token] for token in visible] if self._one_by_one else [visible]:
            certain, stop = self._stops.push(self._stream.push(piece))
            text, taken = text + certain, taken + len(piece)
            if stop is not None:
                break
        else:
            taken = len(step.token_ids)
        reason: FinishReason | None = "stop" if stop is not None else step.finish_reason
        if reason is not None and stop is None:
            rest, stop = self._stops.push(self._stream.finish())
            text += rest if stop is not None else rest + self._stops.finish()
        logprobs = step.logprobs[:taken] if step.logprobs is not None else None
        self.text += text
        self.finish_reason = "stop" if stop is not None else reason
        if self.finish_reason == "stop":
            self.stop_reason = stop if stop is not None else self._stop_token(step.token_ids[-1])
        if self._logprobs is not None:
            self._logprobs += logprobs or []
        return GenerationChunk(
            text,
            step.token_ids[:taken],
            min(step.num_accepted, taken),
            self.finish_reason,
            self.index,
            logprobs,
            self.stop_reason,
            time.perf_counter() - self.sequence.since if self.sequence is not None else 0.0,
            step.draft,
        )

    def choice(self) -> Choice:
        """The whole answer, once it has ended."""
        assert self.sequence is not None
        assert self.finish_reason is not None
        sequence = self.sequence
        return Choice(
            self.text,
            sequence.token_ids,
            self.finish_reason,
            sequence.stats,
            sequence.seed,
            self._logprobs,
            self.stop_reason,
        )

    def _stop_token(self, token_id: int) -> str | int | None:
        """The request's stop text or stop token that this token is; None if the model ended the answer by itself."""
        if token_id in self._special_stops:
            return self._special_stops[token_id]
        assert self.sequence is not None
        return token_id if token_id in self.sequence.options.stop_token_ids else None
