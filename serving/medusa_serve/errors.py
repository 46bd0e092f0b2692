"""Errors as OpenAI's API tells them: a status, and a JSON object that names the field which is wrong."""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import JSONResponse

from medusa_runtime import (
    CapacityError,
    ClosedError,
    ContextLengthError,
    DeviceLostError,
    GenerationOptions,
    MedusaError,
    MissingExtraError,
    OptionError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    TreeError,
)

LONGEST_MESSAGE = 1000  # characters; some messages quote the request
RETRY_SECONDS = 1  # how long a client is asked to wait before it tries again
CLIENT_GONE = 499  # in logs and metrics; nobody is left to be told
QUOTING = {400, 404, 422}  # statuses of messages that quote the request
KINDS = {401: "authentication_error", 429: "rate_limit_error"}
STATUS: dict[type[MedusaError], tuple[int, str | None]] = {
    ContextLengthError: (400, "context_length_exceeded"),
    CapacityError: (400, "too_much"),
    OptionError: (400, None),
    TreeError: (400, None),
    QueueFullError: (429, "queue_full"),
    QueueTimeoutError: (503, "queue_timeout"),
    ClosedError: (503, "not_running"),
    DeviceLostError: (503, "device_lost"),
    MissingExtraError: (500, "missing_package"),
}
# What the API calls the runtime's options; those not named here have one name everywhere.
API_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "template_options": "chat_template_kwargs",
}
# Requests cannot choose how special tokens in their text are read; the operator can.
PLAIN_CONTENT = ("ask without plain_content", "the operator can let such text through with --special-tokens-in-text")
OWN_NAME = re.compile("|".join(rf"\b{name}\b" for name in API_NAMES))
API_FIELDS = {API_NAMES.get(name, name) for name in GenerationOptions.model_fields}  # a message that begins so names its field


class ApiError(Exception):
    """A request that is refused, or that failed.

    Args:
        status: of the response.
        message: one line: what was wrong, what was found, what to do.
        param: the field that is wrong.
        code: a name of the error for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = " ".join(message.split())
        message = message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 3]}..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if status in {429, 503}:
            self.headers.setdefault("Retry-After", str(RETRY_SECONDS))

    @property
    def logged(self) -> str:
        """The error without anything that its message quotes of the request: logs hold no texts unless asked."""
        if self.status not in QUOTING:
            return self.message
        return f"{self.code or 'invalid_value'}{f': {self.param}' if self.param else ''}"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response, and of an event that ends a stream."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body, self.status, self.headers)

    @classmethod
    def of(cls, error: MedusaError, *, while_decoding: bool = False) -> ApiError:
        """What a client is told of an error of the runtime. Options of the runtime get the names that the API has for them.

        Args:
            error: the runtime's.
            while_decoding: the request had been taken. A lack of memory is then no fault of the client's.
        """
        status, code = next((told for kind, told in STATUS.items() if isinstance(error, kind)), (500, None))
        if isinstance(error, RequestError) and error.__cause__ is None:  # told on purpose: the answer cannot follow its form
            status, code = 422, "cannot_be_followed"
        if while_decoding and isinstance(error, CapacityError):
            status, code = 503, "out_of_memory"
        message = OWN_NAME.sub(lambda found: API_NAMES[found[0]], str(error)).replace(*PLAIN_CONTENT)
        first = message.split(" ", 1)[0]
        return cls(status, message, param=first if status == 400 and first in API_FIELDS else None, code=code)


def failure(request_id: str) -> ApiError:
    """The server has a fault, which its log describes."""
    return ApiError(500, f"the server failed; its log has more about request {request_id}", code="internal_error")


def not_ready(why: str) -> ApiError:
    """The server takes no requests now."""
    return ApiError(503, why, code="not_ready")
