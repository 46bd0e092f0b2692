"""The request of `/v1/responses`: OpenAI's newer API, as far as it is about text and functions."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medusa_runtime import Manifest
from medusa_serve.protocol.base import FieldError, Items, unsupported
from medusa_serve.protocol.chat import Function, NamedFunction, NamedTool, Tool, ToolFields
from medusa_serve.protocol.sampling import (
    ANY_OBJECT,
    MedusaFields,
    UnusedFields,
    default_temperature,
    refuse_unsupported,
)

TEXT_PARTS = ("input_text", "output_text", "text")
ROLES = ("user", "assistant", "system", "developer")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextFormat(_Part):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="has no effect here: answers always follow the schema")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise FieldError("text.format", "'text.format' needs schema if, and only if, its type is json_schema")
        return self


class TextOptions(_Part):
    """OpenAI's `text`."""

    format: TextFormat = TextFormat()
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="has no effect here: a hint for other models")


class ResponseFunction(_Part):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="true needs tool_choice required, or the function's name")


class NamedChoice(_Part):
    """A function that has to be called."""

    type: Literal["function"]
    name: str


class Reasoning(_Part):
    """OpenAI's `reasoning`."""

    effort: str | None = Field(None, description="for chat templates that have the variable reasoning_effort")
    summary: str | None = Field(None, description="not supported: reasoning is told as it is")
    generate_summary: str | None = Field(None, description="not supported")


class EventOptions(_Part):
    """The field `stream_options`."""

    include_obfuscation: bool | None = Field(None, description="has no effect here")


class ResponsesRequest(UnusedFields):
    """The body of `POST /v1/responses`."""

    model: str | None = Field(None, description="the model's name; omit for the one that is served")
    input: str | Items[dict[str, Any]] = Field(description="a text, or messages, calls of functions and their results")
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: int | None = Field(None, ge=0, description="the most tokens of the answer")
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy; omit for the model's own value, or 1")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="(vLLM)")
    min_p: float | None = Field(None, ge=0, le=1, description="(vLLM)")
    seed: int | None = Field(None, description="(vLLM)")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="(vLLM)")
    stream: bool | None = None
    stream_options: EventOptions | None = None
    text: TextOptions = TextOptions()
    tools: Items[ResponseFunction] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(None, description="has no effect here: it is about tools that a server runs")
    reasoning: Reasoning = Reasoning()
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="further variables of the chat template (vLLM)")
    medusa: MedusaFields = MedusaFields()
    store: bool | None = Field(None, description="false alone: nothing is stored")
    background: bool | None = Field(None, description="false alone")
    truncation: Literal["auto", "disabled"] | None = Field(None, description="disabled alone")
    include: Items[str] | None = Field(None, description="nothing can be included")
    previous_response_id: str | None = Field(None, description="not supported: nothing is stored")
    conversation: str | dict[str, Any] | None = Field(None, description="not supported: nothing is stored")
    prompt: dict[str, Any] | None = Field(None, description="not supported: nothing is stored")
    top_logprobs: int | None = Field(None, description="not supported; use /v1/chat/completions")

    @model_validator(mode="after")
    def _supported(self) -> Self:
        nothing_stored = "nothing is stored; send the whole conversation as 'input'"
        refuse_unsupported(
            {
                "previous_response_id": (self.previous_response_id is not None, nothing_stored),
                "conversation": (self.conversation is not None, nothing_stored),
                "prompt": (self.prompt is not None, nothing_stored),
                "store": (bool(self.store), "nothing is stored"),
                "background": (bool(self.background), "an answer comes with its request"),
                "truncation": (self.truncation == "auto", "a conversation that is too long is refused"),
                "include": (bool(self.include), "nothing can be included"),
                "top_logprobs": (bool(self.top_logprobs), "use /v1/chat/completions"),
                "reasoning.summary": (bool(self.reasoning.summary), "reasoning is told as it is"),
                "reasoning.generate_summary": (bool(self.reasoning.generate_summary), "reasoning is told as it is"),
            }
        )
        if not self.input:
            raise FieldError("input", "'input' is empty; give a text, or at least one item")
        self.tool_fields.check()
        forces_call = self.tool_choice == "required" or isinstance(self.tool_choice, NamedChoice)
        if forces_call and self.text.format.type != "text":
            raise FieldError("tool_choice", "'tool_choice' asks for a call, which no other form of the answer can hold")
        return self

    @property
    def tool_fields(self) -> ToolFields:
        """The fields about tools, as the chat's request has them."""
        tools = [Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in self.tools or []]
        choice = self.tool_choice or "auto"
        if isinstance(choice, NamedChoice):
            named = NamedTool(type="function", function=NamedFunction(name=choice.name))
            return ToolFields(tools, named, self.parallel_tool_calls is not False)
        return ToolFields(tools, choice, self.parallel_tool_calls is not False)

    @property
    def template_options(self) -> dict[str, Any]:
        """Further variables of the chat template."""
        effort = {} if self.reasoning.effort is None else {"reasoning_effort": self.reasoning.effort}
        return effort | (self.chat_template_kwargs or {})

    def options(self, manifest: Manifest) -> dict[str, Any]:
        """Fields of `GenerationOptions`."""
        form = self.text.format
        schema = {"json_schema": form.schema_, "json_object": ANY_OBJECT}.get(form.type)
        return {
            "max_new_tokens": self.max_output_tokens,
            "temperature": default_temperature(manifest) if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "repetition_penalty": self.repetition_penalty,
            "json_schema": schema,
            **self.medusa.options(),
        }

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The input as messages of a chat.

        Raises:
            FieldError: an item is of a kind that this server does not know.
        """
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for place, item in enumerate(items):
            _add(messages, f"input.{place}", item)
        return messages


def _add(messages: list[dict[str, Any]], where: str, item: dict[str, Any]) -> None:
    """Add an item. What the assistant did in a row is one message."""
    match item.get("type", "message"):
        case "message":
            role = item.get("role")
            if role not in ROLES:
                raise FieldError(f"{where}.role", f"'{where}.role' is {role!r:.80}; it must be one of: {', '.join(ROLES)}")
            content = _text(f"{where}.content", item.get("content"))
            if role == "assistant":
                _assistant(messages, "content")["content"] = content
            else:
                messages.append({"role": role, "content": content})
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            calls = _assistant(messages).setdefault("tool_calls", [])
            calls.append({"id": item.get("call_id"), "type": "function", "function": function})
        case "function_call_output":
            output = _text(f"{where}.output", item.get("output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        case "reasoning":
            if text := "".join(part.get("text", "") for part in item.get("content") or [] if isinstance(part, dict)):
                _assistant(messages, "content", "tool_calls")["reasoning_content"] = text
        case kind:
            raise unsupported(where, f"this server knows no items of type {kind!r:.80}")


def _assistant(messages: list[dict[str, Any]], *ended_by: str) -> dict[str, Any]:
    """The assistant's last message, if nobody spoke since and it has none of some fields; else a new one."""
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in ended_by):
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise FieldError(where, f"'{where}' is {content!r:.80}; it must be text, or a list of text parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise unsupported(where, f"the part {part!r:.80} is no text")
    return "".join(part["text"] for part in content)
