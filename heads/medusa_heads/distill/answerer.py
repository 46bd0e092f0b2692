"""The interface of a distillation backend: it takes requests and returns answers, many at a time and in any order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from medusa_runtime.text.codec import Message


@dataclass(frozen=True)
class Request:
    """A request for one answer."""

    key: str
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]  # the messages in the chat template, up to the start of the answer
    max_new_tokens: int
    temperature: float = 0.0  # 0 for greedy
    seed: int = 0  # a seed of its own, so that the answer does not depend on other requests


@dataclass(frozen=True)
class Answer:
    """The model's answer to a request."""

    request: Request
    token_ids: list[int]  # including the end-of-sequence token, if the answer ended with one
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Refusal:
    """A request that will never be answered, because of what it asks."""

    request: Request
    reason: str


@dataclass(frozen=True)
class Made:
    """Tokens that were made since the last report, of finished and unfinished answers."""

    num_tokens: int


class Answerer(Protocol):
    """A backend. `next_request` returns None if there is nothing to do now; a later answer may lead to new requests.

    Closing the generator abandons unfinished requests.
    """

    def answers(self, next_request: Callable[[], Request | None]) -> Generator[Answer | Refusal | Made, None, None]: ...


class Codec(Protocol):
    """Converts messages to token ids and back, with the model's own tokenizer and chat template, if it has one."""

    @property
    def is_chat(self) -> bool: ...  # whether it has one

    def encode(self, prompt: Sequence[Message]) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    # token ids of a conversation up to the words that the user says next, or of any text; and of the first of these words
    def opening(self, messages: Sequence[Message] = (), start: str = "") -> list[int]: ...

    # the words in what the model wrote after `opening`; None if it did not come to their end. ended: it wrote an end token
    def user_words(self, token_ids: Sequence[int], *, ended: bool) -> str | None: ...
