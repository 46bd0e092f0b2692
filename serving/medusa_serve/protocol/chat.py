"""The request of `/v1/chat/completions`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medusa_serve.protocol.base import FieldError, Items
from medusa_serve.protocol.sampling import MAX_TOP_LOGPROBS, SamplingFields, refuse_unsupported


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments")
    strict: bool | None = Field(None, description="true needs tool_choice required, or the function's name")


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str


class NamedTool(BaseModel):
    """A tool that has to be called."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["function"]
    function: NamedFunction


@dataclass(frozen=True)
class ToolFields:
    """The fields about tools, as all endpoints understand them."""

    tools: list[Tool]
    tool_choice: Literal["none", "auto", "required"] | NamedTool
    parallel: bool  # whether an answer may have several calls

    def check(self) -> None:
        """Raise a FieldError if they contradict each other."""
        if not self.tools and self.tool_choice not in ("none", "auto"):
            raise FieldError("tool_choice", "'tool_choice' asks for a call, and there are no 'tools'")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise FieldError("tools", "'tools' has two functions of one name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise FieldError(
                "tool_choice", f"'tool_choice' names '{self.tool_choice.function.name[:80]}', which is not in 'tools'"
            )
        if self.tool_choice == "auto" and (strict := [tool for tool in self.tools if tool.function.strict]):
            raise FieldError(
                "tools",
                f"'strict' of the function '{strict[0].function.name}' needs 'tool_choice' required, or the function's name: "
                "with auto the model itself decides how it writes a call",
                "unsupported_parameter",
            )

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def chosen(self) -> Tool | None:
        """The tool that has to be called."""
        if not isinstance(self.tool_choice, NamedTool):
            return None
        return next(tool for tool in self.tools if tool.function.name == self.tool_choice.function.name)


class ChatRequest(SamplingFields):
    """The body of `POST /v1/chat/completions`."""

    messages: Items[dict[str, Any]] = Field(min_length=1, description="the conversation: objects with role and content")
    max_completion_tokens: int | None = Field(None, ge=0, description="as max_tokens, which is its older name")
    logprobs: bool | None = Field(None, description="tell how likely the answer's tokens are")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="and how likely other tokens were")
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="false for one call at most")
    chat_template: str | None = Field(None, description="the name of one of the bundle's chat templates")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="further variables of the chat template (vLLM)")
    documents: Items[dict[str, Any]] | None = Field(None, description="texts for the chat template (vLLM)")
    add_generation_prompt: bool | None = Field(None, description="end the prompt with the start of an answer (vLLM)")
    continue_final_message: bool = Field(False, description="go on with the last message (vLLM)")
    echo: bool = Field(False, description="begin the answer with the last message, if it goes on (vLLM)")
    include_reasoning: bool = Field(True, description="false leaves the reasoning out of the answer (vLLM)")
    reasoning_effort: str | None = Field(None, description="for chat templates that have this variable")
    store: bool | None = Field(None, description="false alone: nothing is stored")
    modalities: Items[Literal["text"]] | None = None
    audio: dict[str, Any] | None = Field(None, description="not supported")
    prediction: dict[str, Any] | None = Field(None, description="not supported")
    web_search_options: dict[str, Any] | None = Field(None, description="not supported")
    functions: Items[dict[str, Any]] | None = Field(None, description="not supported; use tools")
    function_call: str | dict[str, Any] | None = Field(None, description="not supported; use tool_choice")

    @model_validator(mode="after")
    def _supported(self) -> Self:
        refuse_unsupported(
            {
                "store": (bool(self.store), "nothing is stored"),
                "audio": (self.audio is not None, "the model knows text alone"),
                "prediction": (
                    self.prediction is not None,
                    "use 'medusa': {'prompt_lookup': true}, which drafts from the prompt",
                ),
                "web_search_options": (self.web_search_options is not None, "there is no web search"),
                "functions": (self.functions is not None, "use 'tools'"),
                "function_call": (self.function_call is not None, "use 'tool_choice'"),
            }
        )
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "'top_logprobs' is given, and 'logprobs' is not true")
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise FieldError("max_tokens", "'max_tokens' and 'max_completion_tokens' are two numbers; give one of them")
        if self.echo and not self.continue_final_message:
            raise FieldError("echo", "'echo' needs 'continue_final_message'")
        self.tool_fields.check()
        if self.forces_call and self.structure:
            raise FieldError("tool_choice", "'tool_choice' asks for a call, which no other form of the answer can hold")
        return self

    @property
    def tool_fields(self) -> ToolFields:
        """The fields about tools."""
        return ToolFields(self.tools or [], self.tool_choice or "auto", self.parallel_tool_calls is not False)

    @property
    def forces_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def template_options(self) -> dict[str, Any]:
        """Further variables of the chat template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
