"""What is known of a request once it has ended: metrics, the access log and traces are made from it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from medusa_runtime import DecodingStats


@dataclass
class RequestRecord:
    """One request. It is filled while the request runs, and reported once when it has ended.

    A request to an endpoint that decodes nothing leaves everything from `model` on as it is.
    """

    request_id: str
    method: str
    path: str  # the route's own, such as /v1/chat/completions, so that there are few of them
    client: str | None = None  # the address; None for a Unix socket
    traceparent: str | None = None  # the header of this name, as W3C Trace Context has it
    since: float = field(default_factory=time.time)  # when it came: seconds since 1970
    status: int = 200  # 499 if the client went away before the answer's end
    seconds: float = 0.0  # from its arrival to the last byte of the answer
    error: str | None = None  # one line, if it failed or was refused
    model: str | None = None  # the name by which the model was asked for
    streamed: bool = False
    n: int = 1  # answers asked for
    max_tokens: int | None = None
    finish_reasons: list[str] = field(default_factory=list)  # one an answer: stop, length, tool_calls, abort or error
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that were in the cache already
    answer_tokens: int = 0  # of all answers, as far as they have come
    first_token_seconds: float | None = None  # from the arrival of the request
    gaps: list[float] = field(default_factory=list)  # seconds between two chunks of one answer
    stats: list[DecodingStats] = field(default_factory=list)  # one an answer
    prompt: str | None = None  # only if the server was told to log texts
    answer: str | None = None
