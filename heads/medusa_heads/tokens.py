"""A checkpoint's tokenizer, for distillation and training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from medusa_heads.distill.prompts import only_text
from medusa_heads.vocabulary import vocabulary_digest
from medusa_runtime.errors import OptionError, first_line
from medusa_runtime.text.codec import Message

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # placeholder for the user's words


class CheckpointCodec:
    """Converts messages to token ids and back, with a Transformers tokenizer.

    A base model has no chat template. Its prompt is one message, of which the answer is the continuation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.tokenizer.chat_template)

    @cached_property
    def digest(self) -> str:
        """Digest of the vocabulary."""
        return vocabulary_digest(self.tokenizer.get_vocab())

    def encode(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids of messages in the chat template, up to the start of the answer. Without one, those of the only message.

        Raises:
            OptionError: the template refuses the messages, or there are several for a base model.
        """
        if not self.is_chat:
            return self._plain_ids(only_text(prompt))
        return self.text_ids(self._render(prompt, add_generation_prompt=True))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, without template and special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def answer_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the last message (the assistant's), with the special token that the template puts after it."""
        if not self.is_chat:
            only_text(messages[:-1])
            return [*self.text_ids(messages[-1]["content"]), *([] if (eos := self.closing()) is None else [eos])]
        before, whole = self._render(messages[:-1], add_generation_prompt=True), self._render(messages)
        if not whole.startswith(before):
            raise OptionError(
                "the chat template changes earlier messages when an answer is added; give response_token_ids with the data"
            )
        ids, end = self.text_ids(whole[len(before) :]), self.closing()
        return ids[: ids.index(end) + 1] if end in ids else ids

    def opening(self, messages: Sequence[Message] = (), start: str = "") -> list[int]:
        """Token ids of a conversation up to the words that the user says next; for a base model, what every text begins with.

        Args:
            messages: the conversation so far.
            start: the first of the user's words, which are then at the end of the ids.

        Raises:
            OptionError: the template refuses the messages, or changes the user's words.
        """
        if not self.is_chat:
            if start:
                return self._plain_ids(start)
            first = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
            return [] if first is None else [first]
        text = self._render([*messages, {"role": "user", "content": start + MARK}])
        if text.count(MARK) != 1 or start + MARK not in text:
            raise OptionError(
                "the chat template changes the user's words, so the model cannot write its own prompts; give --prompts instead"
            )
        return self.text_ids(text[: text.index(MARK)])

    @cached_property
    def _user_end(self) -> str:
        """The text by which a template shows that the user's words have ended and the answer begins.

        It is the special token after the words, or else the first line after them: `[/INST]`, `ASSISTANT:`.
        """
        text = self._render([{"role": "user", "content": MARK}], add_generation_prompt=True)
        after = text.partition(MARK)[2].strip()
        if not after:
            raise OptionError(
                "the chat template has nothing between the user's words and the answer, so the model cannot write its own "
                "prompts; give --prompts instead"
            )
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        found = [token for token in special if after.startswith(token)]
        return max(found, key=len) if found else after.split("\n")[0].strip()

    def user_words(self, token_ids: Sequence[int], *, ended: bool) -> str | None:
        """The user's words in what the model wrote after `opening`; None if it did not come to their end.

        Many templates put no end token after the user's words. The model then goes on with the sign that begins the answer, and
        with an answer, which are no part of the words.

        Args:
            token_ids: what the model wrote.
            ended: whether it ends with an end token.

        Raises:
            OptionError: the chat template has no sign of where the user's words end.
        """
        if not self.is_chat:
            return self.decode(token_ids)
        text = str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        words, sign, _ = text.partition(self._user_end)
        if sign:
            return words.rstrip()  # a space before them separates them from the first words that were given
        return self.decode(token_ids) if ended else None

    def closing(self) -> int | None:
        """The special token that the chat template puts after an answer, or else the tokenizer's end-of-sequence token."""
        end: int | None = self.tokenizer.eos_token_id
        if not self.is_chat:
            return end
        text = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}])
        after = self.text_ids(text.partition(MARK)[2])[:1]
        known = self.tokenizer.added_tokens_decoder
        if after and after[0] in known and known[after[0]].special:
            return after[0]
        return end

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids of a text with the special tokens that it begins with, but not the one that would end it."""
        ids = list(self.tokenizer(text).input_ids)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id and len(ids) > 1 else ids

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        conversation: Any = list(messages)
        try:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # the template is foreign code and can raise anything
            raise OptionError(f"the chat template refuses {messages!r:.80}: {first_line(error)}") from error
        return str(text)
