"""What a distillation backend is: it takes requests and gives answers, many at a time and in any order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from medusa_runtime.text.codec import Message


@dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    key: str
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]  # the messages through the chat template, up to where the answer starts
    max_new_tokens: int
    temperature: float = 0.0  # 0 for greedy
    seed: int = 0  # of this request alone, so that its answer does not depend on what runs beside it


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    request: Request
    token_ids: list[int]  # the end-of-sequence token included, where the answer ended by one
    finish_reason: Literal["stop", "length"]


class Answerer(Protocol):
    """A backend. `next_request` gives None while there is nothing to do, which a later answer may change.

    Closing the generator gives up what is under way.
    """

    def answers(self, next_request: Callable[[], Request | None]) -> Generator[Answer, None, None]: ...


class Codec(Protocol):
    """Messages to token ids and back, as the model's own tokenizer and chat template do."""

    def encode(self, prompt: Sequence[Message]) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def opening(self) -> list[int]: ...  # a conversation's token ids up to where the user's first words begin
