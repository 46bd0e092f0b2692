"""Text in, text out: the bundle's tokenizer, its chat template, and decoding as tokens stream in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer
from typing_extensions import TypedDict  # pydantic reads it, and knows the one in typing from Python 3.12 on only

from medusa_runtime.errors import BundleError, OptionError, first_line
from medusa_runtime.text.template import GenerationTag, refuse

TOKENIZER_NAME = "tokenizer.json"
CHAT_NAME = "chat.json"


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | Sequence[Message]


class TextCodec:
    """Turns prompts into token ids and token ids into text, as the bundle's checkpoint does.

    Raises:
        BundleError: the tokenizer is missing or damaged.
    """

    def __init__(self, bundle: str | Path) -> None:
        self._bundle = Path(bundle)
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(self._bundle / TOKENIZER_NAME))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise BundleError(f"{self._bundle / TOKENIZER_NAME} cannot be read ({error}); export it again") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: messages, or one user message as text.
            raw: take the text as it is, without the chat template. So is done for a model that has none.

        Raises:
            OptionError: messages for a model without a chat template, or messages its template refuses.
        """
        if not isinstance(prompt, Sequence):
            raise OptionError(f"the prompt is {prompt!r}; it must be text, or a list of messages")
        if isinstance(prompt, str):
            if raw or not self.has_chat_template:
                return self._ids(prompt, add_special_tokens=True)
            prompt = [{"role": "user", "content": prompt}]
        elif raw:
            raise OptionError("raw takes text, not messages")
        return self._ids(self.render(prompt), add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, such as undecodable bytes of a command line become
            raise OptionError("the prompt is not Unicode text") from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids)))

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint came with a chat template."""
        return bool(self._chat.get("template"))

    def render(self, messages: Sequence[Message]) -> str:
        """The chat template's text for messages, up to where the assistant's answer starts.

        The template runs sandboxed: it comes with the checkpoint and is not trusted.
        """
        if not self.has_chat_template:
            raise OptionError("this model has no chat template; give the prompt as text")
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise OptionError(f"a message is an object with role and content; found {message!r}")
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._chat["special_tokens"],
            )
        except Exception as error:  # the template is a program from elsewhere: it may fail in any way
            raise OptionError(f"the chat template refuses these messages: {first_line(error)}") from error

    @cached_property
    def _chat(self) -> dict[str, Any]:
        path = self._bundle / CHAT_NAME
        try:
            chat: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from error
        if not isinstance(chat, dict) or not isinstance(chat.get("special_tokens"), dict):
            raise BundleError(f"{path} has no template and special tokens; export the bundle again")
        return chat

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        return environment.from_string(self._chat["template"])
