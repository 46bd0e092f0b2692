"""What comes back: chunks of an answer, whole answers, and the state of a service."""

from __future__ import annotations

from dataclasses import dataclass

from medusa_runtime.decoding.sequence import FinishReason, TokenLogprob
from medusa_runtime.decoding.stats import DecodingStats


@dataclass(frozen=True)
class GenerationChunk:
    """What one step added to an answer."""

    text: str  # may be empty while a character, or a stop string, is incomplete
    token_ids: list[int]
    num_accepted: int  # drafts accepted in this step
    finish_reason: FinishReason | None = None
    index: int = 0  # which of the request's answers
    logprobs: list[TokenLogprob] | None = None  # one a token, where they were asked for


@dataclass(frozen=True)
class Choice:
    """One whole answer."""

    text: str
    token_ids: list[int]  # the end-of-sequence token included, where the answer ended by one
    finish_reason: FinishReason  # "cancelled" for one that was cut short by `Handle.cancel`
    stats: DecodingStats
    seed: int  # with it, and the same options, the same answer comes again
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class GenerationResult:
    """All answers to a request; what is asked of it directly is the first one's."""

    choices: list[Choice]

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
        """The request's."""
        return self.choices[0].seed

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """The first answer's, where they were asked for."""
        return self.choices[0].logprobs


@dataclass(frozen=True)
class ServiceStats:
    """A service at one moment, and all it did since it was opened."""

    num_waiting: int  # answers that have no slot yet
    num_active: int  # answers being decoded
    max_batch_size: int
    num_completed: int
    num_cancelled: int
    num_failed: int
    num_refused: int  # for a full queue
    queue_seconds: float  # means over the answers that have ended by themselves: from the request to the start of its prefill
    first_token_seconds: float  # from the request to the first token
    seconds_per_token: float  # after the first token
    decoding: DecodingStats  # of all answers so far; its prefill, decode and engine seconds are the engine's own
