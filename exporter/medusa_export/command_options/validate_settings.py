"""The settings of `medusa-export validate` that a recipe has as well."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from medusa_runtime.text.conversation import Prompt

DEFAULT_NEW_TOKENS = 48


class ValidateSettings(BaseModel):
    """What a bundle is compared on."""

    model_config = ConfigDict(extra="forbid")

    prompts: tuple[Prompt, ...] | None = Field(None, description="prompts to compare; none for the built-in ones")
    max_new_tokens: int = Field(DEFAULT_NEW_TOKENS, ge=1, description="tokens to decode per prompt")
