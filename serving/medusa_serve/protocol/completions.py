"""The request of `/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from medusa_serve.protocol.base import FieldError, Items
from medusa_serve.protocol.sampling import MAX_TOP_LOGPROBS, SamplingFields, refuse_unsupported

TokenId = Annotated[int, Field(ge=0, strict=True)]
SomeTokens = Annotated[Items[TokenId], Field(min_length=1)]
Prompts = str | SomeTokens | Annotated[Items[str | Items[TokenId]], Field(min_length=1)]
MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`."""

    prompt: Prompts = Field(description="text or token ids, or a list of them")
    max_tokens: int | None = Field(
        DEFAULT_MAX_TOKENS, ge=0, description="the most tokens of an answer; 0 with echo only scores"
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="tell how likely the tokens are, and others were")
    echo: bool = Field(False, description="begin each answer with its prompt")
    best_of: int | None = Field(None, description="not supported, unless it equals n")
    suffix: str | None = Field(None, description="not supported")
    add_special_tokens: bool = Field(True, description="true alone (vLLM)")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]

    @model_validator(mode="after")
    def _supported(self) -> Self:
        refuse_unsupported(
            {
                "best_of": (self.best_of not in (None, self.n), "ask for 'n' answers, and choose"),
                "logprobs": (
                    bool(self.stream and self.echo and self.logprobs is not None),
                    "with 'echo', the prompt's log-probabilities cannot be streamed",
                ),
                "suffix": (bool(self.suffix), "the model only continues a text"),
                "add_special_tokens": (not self.add_special_tokens, "give the prompt as token ids instead"),
            }
        )
        if len(self.prompts) > MAX_PROMPTS:
            raise FieldError("prompt", f"'prompt' has {len(self.prompts)} prompts; it must have at most {MAX_PROMPTS}")
        return self
