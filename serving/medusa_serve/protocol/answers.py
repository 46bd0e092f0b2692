"""What responses hold. Endpoints write dictionaries; these types describe them for the OpenAPI document."""

from __future__ import annotations

from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic reads these, and knows those in typing from Python 3.12 on only
)

from typing_extensions import TypedDict

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """A request that was refused, or that failed."""

    error: ErrorDetail


class CachedTokens(TypedDict):
    """Tokens of the prompt that were in the KV cache already."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class SpeculativeDecoding(TypedDict):
    """What drafts did for a request, in vLLM's terms."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int


class RequestMetrics(TypedDict):
    """How a request was decoded."""

    speculative_decoding: NotRequired[SpeculativeDecoding]  # missing if no step verified a draft
    first_token_seconds: float | None
    tokens_per_second: float


class CalledFunction(TypedDict):
    """A function with its arguments, as JSON text."""

    name: str
    arguments: str


class ToolCallMessage(TypedDict):
    """A call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallMessage]]


class ChatChoice(TypedDict):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatCompletion(TypedDict):
    """The response of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: RequestMetrics
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]


class CompletionChoice(TypedDict):
    """One continuation of a text."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]


class Completion(TypedDict):
    """The response of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    metrics: RequestMetrics


class ResponseUsage(TypedDict):
    """Token counts, as `/v1/responses` names them."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(TypedDict):
    """The response of `/v1/responses`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    model: str
    instructions: str | None
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    metrics: NotRequired[RequestMetrics]


class Tokens(TypedDict):
    """The response of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


class Text(TypedDict):
    """The response of `/detokenize`."""

    prompt: str


class ModelCard(TypedDict):
    """One name of the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    medusa: dict[str, Any]


class ModelList(TypedDict):
    """The response of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class HealthStatus(TypedDict):
    """The response of `/health`."""

    status: Literal["ok", "failed"]
    reason: str | None


class ReadyStatus(TypedDict):
    """The response of `/ready`, if requests are taken."""

    status: Literal["ready"]


class Version(TypedDict):
    """The response of `/version`."""

    version: str
