"""The distillation loop: has conversations answered turn by turn, and stores the answers."""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from medusa_heads.distill.answerer import Answer, Answerer, Codec, Made, Refusal, Request
from medusa_heads.distill.prompts import Conversation
from medusa_heads.distill.store import AnswerStore, Row
from medusa_runtime.errors import OptionError
from medusa_runtime.text.codec import Message

WINDOW = 1024  # conversations that are sorted by length together: neighbours are similar, and the whole stays mixed
OWN_PROMPT_TOKENS = 256  # longest prompt that the model writes; longer ones are dropped
OWN_BEGINNING_TOKENS = 32  # of a text that a base model begins by itself, before the answer goes on with it
OWN_PROMPT = ".prompt"  # end of the key of a request for such a prompt


@dataclass(frozen=True)
class AnswerOptions:
    """Options for making answers.

    Args:
        max_new_tokens: longest answer.
        max_prompt_tokens: longest prompt. Longer prompts and the turns after them are skipped and counted.
        temperature: temperature of answers; 0 for greedy.
        prompt_temperature: temperature of the prompts that the model writes itself.
        seed: the seed of the run. Each answer's own seed is derived from it and the answer's key, so order and batches do not
            matter.
        skip_refused: skip prompts that the template or the endpoint refuses, and count them. Otherwise they are errors.
    """

    max_new_tokens: int = 256
    max_prompt_tokens: int = 1024
    temperature: float = 0.0
    prompt_temperature: float = 0.8
    seed: int = 0
    skip_refused: bool = False


@dataclass
class Progress:
    """The progress of a run."""

    total: int  # answers to make
    done: int = 0
    resumed: int = 0  # of those done, the ones from an earlier run
    skipped: int = 0  # not answered: the prompt is too long, or was written by the model and is unfinished or a duplicate
    new_tokens: int = 0  # tokens of the answers of this run
    made_tokens: int = 0  # the same with prompts that the model writes, and with unfinished answers, as far as they are told
    refused: dict[str, str] = field(default_factory=dict)  # keys of prompts that were refused, and why
    skipped_refused: int = 0  # of those skipped, the answers to refused prompts and to the turns after them


@dataclass
class _Talk:
    conversation: Conversation
    messages: list[Message] = field(default_factory=list)
    turn: int = 0  # number of answers so far

    @property
    def num_turns(self) -> int:
        return len(self.conversation.turns) or self.conversation.own_turns

    @property
    def key(self) -> str:
        return f"{self.conversation.key}.{self.turn}"

    @property
    def start(self) -> str:
        """The first words of the next prompt that the model writes."""
        return "" if self.turn else self.conversation.start


def digest(conversations: Sequence[Conversation]) -> str:
    """SHA-256 over conversations in their order."""
    whole = hashlib.sha256()
    for conversation in conversations:
        own = (conversation.start, conversation.own_turns) if conversation.start or conversation.own_turns != 1 else ()
        whole.update(repr((conversation.key, conversation.turns, *own)).encode())
    return whole.hexdigest()


def distill(
    conversations: Sequence[Conversation], answerer: Answerer, codec: Codec, store: AnswerStore, options: AnswerOptions
) -> Generator[Progress, None, None]:
    """Answer every turn of every conversation that is not in the store yet. Yields after each answer and each step.

    Args:
        conversations: the conversations. A later turn follows the model's own answers to the earlier ones.
        answerer: the backend that answers.
        codec: the model's tokenizer and chat template.
        store: the store for answers.
        options: options for making answers.

    Raises:
        OptionError: a conversation is refused by the chat template or the endpoint, and `skip_refused` is not set; or the
            template leaves no tokens for a prompt.
    """
    run = _Run(conversations, codec, store, options)
    yield run.progress
    with closing(answerer.answers(run.next_request)) as answers:
        for answer in answers:
            if isinstance(answer, Made):
                run.progress.made_tokens += answer.num_tokens
            else:
                run.take(answer)
            yield run.progress
    yield run.progress


class _Run:
    def __init__(self, conversations: Sequence[Conversation], codec: Codec, store: AnswerStore, options: AnswerOptions) -> None:
        self.codec, self.store, self.options = codec, store, options
        talks = [_Talk(conversation) for conversation in conversations]
        self.progress = Progress(total=sum(talk.num_turns for talk in talks))
        self._require_own_prompts(conversations)
        self.own_prompts = {row.messages[-2]["content"] for row in store.rows.values() if row.source == "self"}
        self.asked: dict[str, _Talk] = {}  # unfinished requests, by key
        self.follow_ups: deque[Request] = deque()
        self.fresh = self._windows(talks)

    def next_request(self) -> Request | None:
        return self.follow_ups.popleft() if self.follow_ups else next(self.fresh, None)

    def take(self, answer: Answer | Refusal) -> None:
        """Store an answer, and queue the request that follows it."""
        talk = self.asked.pop(answer.request.key)
        if isinstance(answer, Refusal):
            self._refuse(talk, answer.reason)
            return
        if answer.request.key.endswith(OWN_PROMPT):
            words = self.codec.user_words(answer.token_ids, ended=answer.finish_reason == "stop")
            asked = talk.start + (words or "")
            if words is None or not asked.strip() or asked in self.own_prompts:
                self.progress.skipped += talk.num_turns - talk.turn
                return
            self.own_prompts.add(asked)
            talk.messages.append({"role": "user", "content": asked})
            follow_up = self._answer_request(talk)
        else:
            said = self.codec.decode(answer.token_ids)
            self.store.append(_row(answer, said, talk.conversation.source))
            talk.messages.append({"role": "assistant", "content": said})
            talk.turn += 1
            self.progress.done += 1
            self.progress.new_tokens += len(answer.token_ids)
            follow_up = self._ask(talk)
        if follow_up is not None:
            self.follow_ups.append(follow_up)

    def _require_own_prompts(self, conversations: Sequence[Conversation]) -> None:
        """Check that the model can write the prompts that it is to write."""
        own = [conversation for conversation in conversations if not conversation.turns]
        if any(conversation.own_turns > 1 for conversation in own) and not self.codec.is_chat:
            raise OptionError("this model has no chat template, so it cannot write several turns; leave --self-turns out")
        limit = self.options.max_prompt_tokens
        for start in sorted({conversation.start for conversation in own}):
            if not 0 < (length := len(self.codec.opening((), start))) < limit:
                raise OptionError(
                    f"the model cannot write its own prompts: there are {length} tokens before the words that it writes; "
                    f"there must be 1 to {limit - 1} (one less than --max-prompt-tokens); use --prompts instead"
                )

    def _windows(self, talks: Sequence[_Talk]) -> Iterator[Request]:
        for start in range(0, len(talks), WINDOW):
            asked = [self._ask(talk) for talk in talks[start : start + WINDOW]]
            requests = [request for request in asked if request is not None]
            yield from sorted(requests, key=lambda request: len(request.prompt_ids), reverse=True)

    def _ask(self, talk: _Talk) -> Request | None:
        """The conversation's next request. Answers that the store already has are taken from it."""
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

    def _prompt_request(self, talk: _Talk) -> Request | None:
        temperature, seed = self.options.prompt_temperature, self._seed(key := talk.key + OWN_PROMPT)
        opening = self.codec.opening(talk.messages, talk.start)
        most = OWN_PROMPT_TOKENS if self.codec.is_chat else OWN_BEGINNING_TOKENS
        max_new_tokens = min(most, self.options.max_prompt_tokens - len(opening))
        if max_new_tokens < 1:  # the turns before leave no room
            self.progress.skipped += talk.num_turns - talk.turn
            return None
        self.asked[key] = talk
        return Request(key, (), tuple(opening), max_new_tokens, temperature, seed)

    def _answer_request(self, talk: _Talk) -> Request | None:
        try:
            prompt_ids = self.codec.encode(talk.messages)
        except OptionError as error:
            self._refuse(talk, str(error))
            return None
        if len(prompt_ids) > self.options.max_prompt_tokens:
            self.progress.skipped += talk.num_turns - talk.turn
            return None
        self.asked[talk.key] = talk
        max_new_tokens, temperature = self.options.max_new_tokens, self.options.temperature
        return Request(talk.key, tuple(talk.messages), tuple(prompt_ids), max_new_tokens, temperature, self._seed(talk.key))

    def _refuse(self, talk: _Talk, reason: str) -> None:
        if not self.options.skip_refused:
            raise OptionError(f"{talk.key}: {reason}; use --skip-refused to leave such prompts out")
        self.progress.skipped += (left := talk.num_turns - talk.turn)
        self.progress.skipped_refused += left
        self.progress.refused[talk.key] = reason

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
