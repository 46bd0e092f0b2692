"""The OpenAPI document: every endpoint with what it takes and gives, made from the same models that read the requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from medusa_serve.protocol import answers
from medusa_serve.protocol.base import RequestBody
from medusa_serve.protocol.chat import ChatRequest
from medusa_serve.protocol.completions import CompletionRequest
from medusa_serve.protocol.responses import ResponsesRequest
from medusa_serve.protocol.tokens import DetokenizeRequest, TokenizeRequest

REFERENCE = "#/components/schemas/{model}"
STATUSES = {
    400: "the request has a field that cannot be honoured; its name is in `param`",
    401: "there is no API key, or a wrong one",
    404: "there is no such model",
    408: "the body did not come in time",
    413: "the body is too long",
    415: "the body is not JSON, by its Content-Type",
    422: "the model cannot follow what is asked for",
    429: "the queue is full; try again after the seconds in Retry-After",
    500: "the server failed",
    503: "the server is not ready, or is shutting down; try again after the seconds in Retry-After",
}
OF_ANSWERS, OF_TOKENS = (400, 401, 404, 408, 413, 415, 422, 429, 500, 503), (400, 401, 404, 408, 413, 415, 500, 503)


@dataclass(frozen=True)
class Operation:
    """One endpoint."""

    method: str
    path: str
    summary: str
    response: Any  # a TypedDict; None for text
    request: type[RequestBody] | None = None
    statuses: tuple[int, ...] = ()  # errors
    streams: bool = False


OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a conversation", answers.ChatCompletion, ChatRequest, OF_ANSWERS, True),
    Operation("post", "/v1/completions", "Continue texts", answers.Completion, CompletionRequest, OF_ANSWERS, True),
    Operation("post", "/v1/responses", "Answer an input", answers.ResponseObject, ResponsesRequest, OF_ANSWERS, True),
    Operation("post", "/tokenize", "The tokens of a text or a conversation", answers.Tokens, TokenizeRequest, OF_TOKENS),
    Operation("post", "/detokenize", "The text of tokens", answers.Text, DetokenizeRequest, OF_TOKENS),
    Operation("get", "/v1/models", "The names of the model", answers.ModelList, None, (401,)),
    Operation("get", "/v1/models/{name}", "One name of the model", answers.ModelCard, None, (401, 404)),
    Operation("get", "/health", "Whether the process is of use", answers.HealthStatus),
    Operation("get", "/ready", "Whether requests are taken now", answers.ReadyStatus, None, (503,)),
    Operation("get", "/version", "The version of the server", answers.Version),
    Operation("get", "/metrics", "Metrics for Prometheus", None),
)
OPEN = ("/health", "/ready", "/version", "/metrics")


def describe(version: str) -> dict[str, Any]:
    """The document.

    Args:
        version: of this package.
    """
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "medusa-export serve", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    name = f"{operation.method}{operation.path}".replace("/", "_").replace("{", "").replace("}", "").replace(".", "_")
    told: dict[str, Any] = {"operationId": name, "summary": operation.summary, "responses": _responses(operation, schemas)}
    if "{name}" in operation.path:
        told["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.request is not None:
        schema = _schema(operation.request, schemas, "validation")
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if operation.path not in OPEN:
        told["security"] = [{"key": []}, {}]  # a server without keys takes requests without one
    return told


def _responses(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    if operation.response is None:
        return {"200": {"description": operation.summary, "content": {"text/plain": {"schema": {"type": "string"}}}}}
    content: dict[str, Any] = {"application/json": {"schema": _schema(operation.response, schemas, "serialization")}}
    told: dict[str, Any] = {"200": {"description": operation.summary, "content": dict(content)}}
    if operation.streams:
        told["200"]["content"]["text/event-stream"] = {}  # only OpenAPI 3.2 has schemas for events
    if operation.path == "/health":
        told["503"] = {"description": "The process should be replaced", "content": content}
    error = {"application/json": {"schema": _schema(answers.ErrorResponse, schemas, "serialization")}}
    told |= {str(status): {"description": STATUSES[status], "content": error} for status in operation.statuses}
    return told


def _schema(kind: Any, schemas: dict[str, Any], mode: Any) -> dict[str, Any]:
    """A reference to the schema of a type, which is added to `schemas` with all that it refers to."""
    schema = TypeAdapter(kind).json_schema(mode=mode, ref_template=REFERENCE)
    schemas.update(schema.pop("$defs", {}))
    schemas[kind.__name__] = schema
    return {"$ref": REFERENCE.format(model=kind.__name__)}
