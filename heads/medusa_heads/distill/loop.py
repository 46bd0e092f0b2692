"""The run itself: conversations go in, answers come out and are kept, turn by turn."""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from medusa_heads.distill.answerer import Answer, Answerer, Codec, Request
from medusa_heads.distill.prompts import Conversation
from medusa_heads.distill.store import AnswerStore, Row
from medusa_runtime.errors import OptionError
from medusa_runtime.text.codec import Message

WINDOW = 1024  # conversations ordered by length among themselves, so that neighbours are alike and the whole stays mixed
OWN_PROMPT_TOKENS = 256  # of a prompt the model writes; a longer one is given up
OWN_PROMPT = ".prompt"  # ends the key of a request for one


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are made.

    Args:
        max_new_tokens: of an answer.
        max_prompt_tokens: longer prompts are skipped and counted, and so are the turns after them.
        temperature: of answers; 0 for greedy.
        prompt_temperature: of the prompts that the model writes itself.
        seed: each answer's own seed is made from it and the answer's key, so that order and batches do not matter.
    """

    max_new_tokens: int = 256
    max_prompt_tokens: int = 1024
    temperature: float = 0.0
    prompt_temperature: float = 0.8
    seed: int = 0


@dataclass
class Progress:
    """Where a run stands."""

    total: int  # answers wanted
    done: int = 0
    resumed: int = 0  # of those done, the ones an earlier run made
    skipped: int = 0  # not answered: the prompt is too long, or it is one of the model's own that never ended or came before
    new_tokens: int = 0  # answers' tokens of this run


@dataclass
class _Talk:
    conversation: Conversation
    messages: list[Message] = field(default_factory=list)
    turn: int = 0  # answers so far

    @property
    def num_turns(self) -> int:
        return len(self.conversation.turns) or 1

    @property
    def key(self) -> str:
        return f"{self.conversation.key}.{self.turn}"


def digest(conversations: Sequence[Conversation]) -> str:
    """SHA-256 over conversations in their order."""
    whole = hashlib.sha256()
    for conversation in conversations:
        whole.update(repr((conversation.key, conversation.turns)).encode())
    return whole.hexdigest()


def distill(
    conversations: Sequence[Conversation], answerer: Answerer, codec: Codec, store: AnswerStore, options: AnswerOptions
) -> Generator[Progress, None, None]:
    """Have every turn of every conversation answered that is not in the store yet. Yields after each answer.

    Args:
        conversations: what to ask. A later turn is asked after the model's own answers to the earlier ones.
        answerer: the model.
        codec: its tokenizer and chat template.
        store: where answers are kept.
        options: how answers are made.

    Raises:
        OptionError: the chat template refuses a conversation, or takes up all tokens of a prompt.
    """
    run = _Run(conversations, codec, store, options)
    yield run.progress
    with closing(answerer.answers(run.next_request)) as answers:
        for answer in answers:
            run.take(answer)
            yield run.progress
    yield run.progress


class _Run:
    def __init__(self, conversations: Sequence[Conversation], codec: Codec, store: AnswerStore, options: AnswerOptions) -> None:
        self.codec, self.store, self.options = codec, store, options
        talks = [_Talk(conversation) for conversation in conversations]
        self.progress = Progress(total=sum(talk.num_turns for talk in talks))
        self.opening = self._opening() if any(not conversation.turns for conversation in conversations) else []
        self.own_prompts = {row.messages[0]["content"] for row in store.rows.values() if row.source == "self"}
        self.asked: dict[str, _Talk] = {}  # requests under way
        self.follow_ups: deque[Request] = deque()
        self.fresh = self._windows(talks)

    def next_request(self) -> Request | None:
        return self.follow_ups.popleft() if self.follow_ups else next(self.fresh, None)

    def take(self, answer: Answer) -> None:
        """Keep an answer, and ask what follows from it."""
        talk = self.asked.pop(answer.request.key)
        said = self.codec.decode(answer.token_ids)
        if answer.request.key.endswith(OWN_PROMPT):
            if answer.finish_reason != "stop" or not said.strip() or said in self.own_prompts:
                self.progress.skipped += 1
                return
            self.own_prompts.add(said)
            talk.messages.append({"role": "user", "content": said})
            follow_up = self._answer_request(talk)
        else:
            self.store.append(_row(answer, said, talk.conversation.source))
            talk.messages.append({"role": "assistant", "content": said})
            talk.turn += 1
            self.progress.done += 1
            self.progress.new_tokens += len(answer.token_ids)
            follow_up = self._ask(talk)
        if follow_up is not None:
            self.follow_ups.append(follow_up)

    def _opening(self) -> list[int]:
        opening = self.codec.opening()
        if not 0 < len(opening) < self.options.max_prompt_tokens:
            limit = self.options.max_prompt_tokens
            raise OptionError(
                f"the model cannot prompt itself: its chat template puts {len(opening)} tokens before the user's words, "
                f"and it takes at least 1 and at most {limit - 1}, one less than --max-prompt-tokens"
            )
        return opening

    def _windows(self, talks: Sequence[_Talk]) -> Iterator[Request]:
        for start in range(0, len(talks), WINDOW):
            asked = [self._ask(talk) for talk in talks[start : start + WINDOW]]
            requests = [request for request in asked if request is not None]
            yield from sorted(requests, key=lambda request: len(request.prompt_ids), reverse=True)

    def _ask(self, talk: _Talk) -> Request | None:
        """The conversation's next request; what the store holds is taken from there."""
        while talk.turn < talk.num_turns:
            row = self.store.rows.get(talk.key)
            if row is None:
                break
            talk.messages = list(row.messages)
            talk.turn += 1
            self.progress.done += 1
            self.progress.resumed += 1
        else:
            return None
        if not talk.conversation.turns:
            return self._prompt_request(talk)
        talk.messages += talk.conversation.turns[talk.turn]
        return self._answer_request(talk)

    def _prompt_request(self, talk: _Talk) -> Request:
        temperature, seed = self.options.prompt_temperature, self._seed(key := talk.key + OWN_PROMPT)
        max_new_tokens = min(OWN_PROMPT_TOKENS, self.options.max_prompt_tokens - len(self.opening))
        self.asked[key] = talk
        return Request(key, (), tuple(self.opening), max_new_tokens, temperature, seed)

    def _answer_request(self, talk: _Talk) -> Request | None:
        try:
            prompt_ids = self.codec.encode(talk.messages)
        except OptionError as error:
            raise OptionError(f"{talk.key}: {error}; leave this prompt out") from error
        if len(prompt_ids) > self.options.max_prompt_tokens:
            self.progress.skipped += talk.num_turns - talk.turn
            return None
        self.asked[talk.key] = talk
        max_new_tokens, temperature = self.options.max_new_tokens, self.options.temperature
        return Request(talk.key, tuple(talk.messages), tuple(prompt_ids), max_new_tokens, temperature, self._seed(talk.key))

    def _seed(self, key: str) -> int:
        return zlib.crc32(f"{self.options.seed} {key}".encode())


def _row(answer: Answer, said: str, source: str) -> Row:
    return Row(
        key=answer.request.key,
        source=source,
        messages=[*answer.request.messages, {"role": "assistant", "content": said}],
        prompt_token_ids=list(answer.request.prompt_ids),
        response_token_ids=answer.token_ids,
        finish_reason=answer.finish_reason,
    )
