"""Text in, text out: the bundle's tokenizer with its chat templates. `TextCodec` is this room's door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from tokenizers import Tokenizer

from medusa_runtime.errors import BundleError, ContextLengthError, OptionError
from medusa_runtime.text import byte_fallback
from medusa_runtime.text.bounds import LengthBound
from medusa_runtime.text.conversation import Conversation, Message, Prompt
from medusa_runtime.text.plain import PlainContent
from medusa_runtime.text.token_bytes import TokenBytes
from medusa_runtime.text.tokenising import encoded

__all__ = ["CHAT_NAME", "TOKENIZER_NAME", "Message", "Prompt", "TextCodec", "WithSpecialTokens"]

TOKENIZER_NAME = "tokenizer.json"
CHAT_NAME = "chat.json"


class TextCodec:
    """Turns prompts into token ids and token ids into text, as the bundle's checkpoint does. Any thread may use it.

    Raises:
        BundleError: the tokenizer or the file of the chat templates is missing or damaged.
    """

    def __init__(self, bundle: str | Path) -> None:
        from medusa_runtime.text.template import ChatTemplate  # noqa: PLC0415 - Jinja, which importing the runtime need not load

        path = Path(bundle) / TOKENIZER_NAME
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise BundleError(f"{path} cannot be read ({error}); export it again") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.chat = ChatTemplate.from_file(Path(bundle) / CHAT_NAME)
        self._special = {
            token.content: token_id for token_id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._has_byte_fallback = byte_fallback.has_byte_fallback(self.tokenizer)
        self._lock = Lock()
        self._plain: PlainContent | None = None

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        plain_content: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: messages, or one user message as text.
            raw: take the text as it is, without the chat template. So is done for a model that has none.
            template: the name of the chat template; see `ChatTemplate.render`.
            template_options: further variables of the template, such as `enable_thinking`.
            tools: JSON schemas of functions that the model may call.
            documents: texts that the model may use.
            add_generation_prompt: end with what opens the assistant's turn. Omit it for yes, or for no if the final message
                is continued.
            continue_final_message: leave the final message open, so that the answer continues it.
            plain_content: encode what users wrote as plain text, also if it is spelled like a special token.
            max_tokens: refuse a text that is certainly longer before it is tokenised. A text that passes may still be longer.

        Raises:
            OptionError: messages for a model without a chat template, or a value that cannot be used.
            ContextLengthError: the prompt is certainly longer than `max_tokens`.
        """
        chosen: dict[str, Any] = {
            "template": template,
            "template_options": template_options,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        if isinstance(prompt, str) and (raw or not self.has_chat_template):
            if given := [name for name, value in chosen.items() if value]:
                reason = "raw leaves the chat template out" if raw else "this model has no chat template"
                raise OptionError(f"{given[0]} is given, but {reason}; leave one of them out")
            self._check_text(prompt, max_tokens)
            return self._plain_content.text_ids(prompt) if plain_content else self._raw_ids(prompt)
        if raw:
            raise OptionError("raw takes text, not messages")
        conversation = self._conversation(prompt, **chosen)
        name = self.chat.chosen(conversation, template)
        conversation = self.chat.prepared(name, conversation)
        text = self.chat.rendered(name, conversation)
        self._check_text(text, max_tokens)
        if plain_content:
            return self._plain_content.token_ids(text, self._plain_content.controls(self.chat, name, conversation, text))
        return list(encoded(self.tokenizer, text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. An incomplete character becomes one replacement character.

        Args:
            token_ids: in the tokenizer's vocabulary; others are left out.
            skip_special_tokens: leave special tokens out.
        """
        text = str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        if self._has_byte_fallback and byte_fallback.UNKNOWN in text:
            return byte_fallback.decoded(self.tokenizer, token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, which may be a part of a character. A special token's are those of its name."""
        return self._token_bytes.of(token_id)

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token that is spelled like this, which `decode` leaves out; None if there is none."""
        return self._special.get(text)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint came with a chat template."""
        return bool(self.chat.sources)

    def render(self, messages: Prompt, **chosen: Any) -> str:
        """The chat template's text for messages. Further arguments are those of `encode` that are about templates."""
        return self.chat.render(self._conversation(messages, **chosen), chosen.get("template"))

    @staticmethod
    def _conversation(
        messages: Prompt, template: str | None = None, template_options: Mapping[str, Any] | None = None, **chosen: Any
    ) -> Conversation:
        del template
        return Conversation.of(messages, options=template_options, **chosen)

    def _raw_ids(self, text: str) -> list[int]:
        """Token ids of a text as it is. One that begins with the tokens that the tokenizer puts first gets no second ones."""
        found = encoded(self.tokenizer, text, add_special_tokens=True)
        ids, is_added = list(found.ids), [*found.special_tokens_mask, 0]
        num_first = is_added.index(0)
        return ids[num_first:] if num_first and ids[num_first : 2 * num_first] == ids[:num_first] else ids

    def _check_text(self, text: str, max_tokens: int | None) -> None:
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as error:  # a lone surrogate, such as undecodable bytes of a command line become
            raise OptionError("the prompt is not Unicode text") from error
        if max_tokens is None or num_bytes <= max_tokens:
            return
        if (least := self._bound.least_tokens(text)) > max_tokens:
            raise ContextLengthError(
                f"the prompt has {num_bytes} bytes, which are {least} tokens at least; "
                f"there is room for {max_tokens}: shorten it"
            )

    @cached_property
    def _bound(self) -> LengthBound:
        return LengthBound(self.tokenizer)

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    @property
    def _plain_content(self) -> PlainContent:
        with self._lock:
            if self._plain is None:
                self._plain = PlainContent(self.tokenizer, self.chat.literals())
            return self._plain


class WithSpecialTokens:
    """Decodes as a codec does, but writes special tokens by their names."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `TextCodec.decode`."""
        return self._codec.decode(token_ids, skip_special_tokens=False)
