"""A checkpoint's tokenizer, as distillation and training see it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from medusa_heads.vocabulary import vocabulary_digest
from medusa_runtime.errors import OptionError, first_line
from medusa_runtime.text.codec import Message

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands where the user's words go


class CheckpointCodec:
    """Messages to token ids and back, by a Transformers tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise OptionError("this model has no chat template, so it cannot be asked anything; take an instruction-tuned one")

    @cached_property
    def digest(self) -> str:
        """Of the vocabulary."""
        return vocabulary_digest(self.tokenizer.get_vocab())

    def encode(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids of messages through the chat template, up to where the answer starts.

        Raises:
            OptionError: the template refuses them.
        """
        return self.text_ids(self._render(prompt, add_generation_prompt=True))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of text as it is."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @cached_property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def answer_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the last message, the assistant's, with the special token that the template puts behind it."""
        before, whole = self._render(messages[:-1], add_generation_prompt=True), self._render(messages)
        if not whole.startswith(before):
            raise OptionError("the chat template rewrites what came before an answer; give response_token_ids with the data")
        ids, end = self.text_ids(whole[len(before) :]), self.closing()
        return ids[: ids.index(end) + 1] if end in ids else ids

    def opening(self) -> list[int]:
        """Token ids of a conversation up to where the user's first words begin."""
        text = self._render([{"role": "user", "content": MARK}])
        if text.count(MARK) != 1:
            raise OptionError("the chat template does not give the user's words as they are, so the model cannot prompt itself")
        return self.text_ids(text[: text.index(MARK)])

    def closing(self) -> int | None:
        """The special token that the chat template puts behind an answer, else the tokenizer's end-of-sequence token."""
        text = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}])
        after = self.text_ids(text.partition(MARK)[2])[:1]
        known = self.tokenizer.added_tokens_decoder
        if after and after[0] in known and known[after[0]].special:
            return after[0]
        end: int | None = self.tokenizer.eos_token_id
        return end

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        conversation: Any = list(messages)
        try:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # the template is a program from elsewhere: it may fail in any way
            raise OptionError(f"the chat template refuses {messages!r:.80}: {first_line(error)}") from error
        return str(text)
