"""One answer of a request: tokens become text, and stop texts end it."""

from __future__ import annotations

from dataclasses import dataclass

from medusa_runtime.decoding.sequence import FinishReason, Sequence, SequenceStep, TokenLogprob
from medusa_runtime.options import GenerationOptions
from medusa_runtime.sampling.shaping import Guide
from medusa_runtime.service.results import Choice, GenerationChunk
from medusa_runtime.text.codec import TextCodec
from medusa_runtime.text.stream import StopStrings, TextStream


@dataclass
class Request:
    """What a worker is asked to answer."""

    prompt_ids: list[int]
    options: GenerationOptions
    guides: list[Guide | None]  # one an answer


class Answer:
    """One answer of a job: tokens become text, and stop strings end it."""

    def __init__(self, index: int, codec: TextCodec, options: GenerationOptions) -> None:
        self.index = index
        self.text, self.token_ids, self.logprobs = "", list[int](), list[TokenLogprob]()
        self.finish_reason: FinishReason | None = None
        self.sequence: Sequence | None = None
        self.is_counted = True  # among those under way
        self._stream = TextStream(codec)
        self._stops = StopStrings(options.stop)
        self._one_by_one = bool(options.stop)  # a stop string may end within a step

    def push(self, step: SequenceStep) -> GenerationChunk | None:
        """Take a step's tokens. None where the answer had ended before."""
        if self.finish_reason is not None:
            return None
        text, taken, stopped = "", 0, False
        for piece in [[token] for token in step.token_ids] if self._one_by_one else [step.token_ids]:
            certain, stopped = self._stops.push(self._stream.push(piece))
            text, taken = text + certain, taken + len(piece)
            if stopped:
                break
        reason: FinishReason | None = "stop" if stopped else step.finish_reason
        if reason is not None and not stopped:
            rest, stopped = self._stops.push(self._stream.finish())
            text += rest if stopped else rest + self._stops.finish()
        logprobs = step.logprobs[:taken] if step.logprobs is not None else None
        self.text, self.finish_reason = self.text + text, reason
        self.token_ids += step.token_ids[:taken]
        self.logprobs += logprobs or []
        return GenerationChunk(text, step.token_ids[:taken], min(step.num_accepted, taken), reason, self.index, logprobs)

    def choice(self, *, with_logprobs: bool) -> Choice:
        """The whole answer, once it has ended."""
        assert self.sequence is not None
        assert self.finish_reason is not None
        logprobs = self.logprobs if with_logprobs else None
        return Choice(self.text, self.token_ids, self.finish_reason, self.sequence.stats, self.sequence.seed, logprobs)
