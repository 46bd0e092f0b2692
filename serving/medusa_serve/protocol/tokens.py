"""The requests of `/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from medusa_serve.protocol.base import FieldError, Items, RequestBody, unsupported
from medusa_serve.protocol.chat import Tool
from medusa_serve.protocol.completions import TokenId


class TokenizeRequest(RequestBody):
    """The body of `POST /tokenize`: a text, or messages."""

    model: str | None = None
    prompt: str | None = Field(None, description="a text, read as `/v1/completions` reads it")
    messages: Items[dict[str, Any]] | None = Field(None, description="a conversation, read as `/v1/chat/completions` reads it")
    add_special_tokens: bool | None = Field(None, description="true for a text and false for messages alone")
    return_token_strs: bool = Field(False, description="also tell each token's text")
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tools: Items[Tool] | None = None
    chat_template: str | None = Field(None, description="the name of one of the bundle's chat templates")
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "there must be either 'prompt' or 'messages'")
        if self.add_special_tokens is not None and self.add_special_tokens != (self.messages is None):
            raise unsupported("add_special_tokens", "texts get the tokenizer's special tokens, messages the chat template's")
        chat = ("add_generation_prompt", "tools", "chat_template", "chat_template_kwargs")
        if self.messages is None and (given := next((name for name in chat if getattr(self, name) is not None), None)):
            raise FieldError(given, f"'{given}' is for messages, and there is a 'prompt'")
        return self


class DetokenizeRequest(RequestBody):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: Items[TokenId] = Field(max_length=1 << 20)
    skip_special_tokens: bool = Field(False, description="leave special tokens out of the text")
