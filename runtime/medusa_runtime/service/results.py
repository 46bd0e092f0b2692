"""Results: chunks of an answer, whole answers, and the state of a service."""

from __future__ import annotations

from dataclasses import dataclass, field

from medusa_runtime.decoding.sequence import FinishReason, TokenLogprob
from medusa_runtime.decoding.slots import CacheUse
from medusa_runtime.decoding.stats import DecodingStats
from medusa_runtime.decoding.verified import VerifiedDraft


@dataclass(frozen=True)
class GenerationChunk:
    """The part of an answer that one step added."""

    text: str  # may be empty while a character, or a stop string, is incomplete
    token_ids: list[int]
    num_accepted: int  # drafts accepted in this step
    finish_reason: FinishReason | None = None
    index: int = 0  # which of the request's answers
    logprobs: list[TokenLogprob] | None = None  # one per token, if the request asked for them
    stop_reason: str | int | None = None  # the stop text or stop token that ended the answer; None if the model ended it
    seconds: float = field(default=0.0, compare=False)  # from the request, as its caller made it, to this chunk
    draft: VerifiedDraft | None = None  # what the step verified, if the request asked for drafts; None for the first token


@dataclass(frozen=True)
class Choice:
    """One whole answer."""

    text: str
    token_ids: list[int]  # with the token that ended the answer, if one did, though it is not part of the text
    finish_reason: FinishReason  # "cancelled" if `Handle.cancel` cut it short
    stats: DecodingStats
    seed: int  # the same seed and options give the same answer again
    logprobs: list[TokenLogprob] | None = None
    stop_reason: str | int | None = None  # the stop text or stop token that ended it; None if the model ended it


@dataclass(frozen=True)
class GenerationResult:
    """All answers to a request. Its own properties are those of the first answer."""

    choices: list[Choice]
    prompt_ids: list[int]
    prompt_logprobs: list[TokenLogprob] | None = None  # of the prompt's tokens from the second on, if asked for

    @property
    def text(self) -> str:
        """The first answer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first answer's tokens."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first answer ended."""
        return self.choices[0].finish_reason

    @property
    def stats(self) -> DecodingStats:
        """The first answer's counts and seconds."""
        return self.choices[0].stats

    @property
    def seed(self) -> int:
        """The seed of the request."""
        return self.choices[0].seed

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """The log-probabilities of the first answer's tokens, if the request asked for them."""
        return self.choices[0].logprobs

    @property
    def stop_reason(self) -> str | int | None:
        """The stop text or stop token that ended the first answer."""
        return self.choices[0].stop_reason


@dataclass(frozen=True)
class ServiceStats:
    """The state of a service now, and its counts since it was opened.

    The three means are over the completed answers: those that were not cancelled, overdue, timed out or failed.
    """

    num_waiting: int  # answers that have no slot yet
    num_active: int  # answers being decoded
    max_batch_size: int
    num_completed: int
    num_cancelled: int
    num_overdue: int  # ended by `deadline_seconds`
    num_failed: int
    num_timed_out: int  # that waited longer for a slot than their `max_queue_seconds`
    num_refused: int  # requests refused because the queue was full
    queue_seconds: float  # mean time from the request to the start of its prefill
    first_token_seconds: float  # mean time from the request to the first token
    seconds_per_token: float  # mean time after the first token
    decoding: DecodingStats  # of all answers so far; its prefill, decode and engine seconds are the engine's own
    cache: CacheUse  # how much of the KV cache is used


@dataclass(frozen=True)
class Health:
    """Whether a service takes requests."""

    is_alive: bool
    why_not: str | None  # None if it is alive
    since: float  # when it was opened, or stopped being alive: seconds since 1970, as of `time.time`
