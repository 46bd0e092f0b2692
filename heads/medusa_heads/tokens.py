"""A checkpoint's tokenizer, as distillation and training see it."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from medusa_heads.vocabulary import vocabulary_digest
from medusa_runtime.errors import OptionError, first_line
from medusa_runtime.text import Message

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands where the user's words go


class CheckpointCodec:
    """Messages to token ids and back, by a Transformers tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise OptionError("this model has no chat template, so it cannot be asked anything; take an instruction-tuned one")

    @property
    def digest(self) -> str:
        """Of the vocabulary."""
        return vocabulary_digest(self.tokenizer.get_vocab())

    def encode(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids of messages through the chat template, up to where the answer starts.

        Raises:
            OptionError: the template refuses them.
        """
        try:
            text = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            raise OptionError(f"the chat template refuses {prompt!r:.80}: {first_line(error)}") from error
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def opening(self) -> list[int]:
        """Token ids of a conversation up to where the user's first words begin."""
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
        if text.count(MARK) != 1:
            raise OptionError("the chat template does not give the user's words as they are, so the model cannot prompt itself")
        return list(self.tokenizer(text[: text.index(MARK)], add_special_tokens=False).input_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
