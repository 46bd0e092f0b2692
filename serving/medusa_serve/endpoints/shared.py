"""What all endpoints do alike: read the body, wait for answers while the client is there, and write events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from medusa_runtime import GenerationOptions, MedusaError, MedusaLM
from medusa_serve.answers import Answers
from medusa_serve.errors import CLIENT_GONE, ApiError, failure
from medusa_serve.guards.body import read_body
from medusa_serve.prompts import Formats, PromptReader
from medusa_serve.protocol.base import RequestBody
from medusa_serve.record import RequestRecord
from medusa_serve.state import ServerState
from medusa_serve.telemetry import speculative_metrics

Body = TypeVar("Body", bound=RequestBody)
Result = TypeVar("Result")
PING_SECONDS = 15  # between comments that keep a silent stream open
DONE = b"data: [DONE]\n\n"
HEAVY_BYTES = 1 << 17  # bodies of more take a while to read
MAX_LOGPROBS, FEW_LOGPROBS = 3_000_000, 10_000  # of a response; one takes about 500 bytes of memory
STRUCTURES = ("json_schema", "regex", "choice", "grammar")
log = logging.getLogger(__name__)


@dataclass
class Call:
    """One request to an endpoint that answers: what it needs of the server, and what its response begins with."""

    state: ServerState
    lm: MedusaLM
    record: RequestRecord
    model: str
    id: str
    request: Request
    created: int = field(default_factory=lambda: int(time.time()))
    num_logprobs: int = 0  # that the response may tell

    @classmethod
    def of(cls, request: Request, model: str | None, prefix: str, request_id: str | None = None) -> Call:
        """Look up the model.

        Raises:
            ApiError: the server serves no model of this name, or is not ready.
        """
        state: ServerState = request.app.state.server
        lm = state.lm
        if model is not None and model not in state.names:
            raise ApiError(
                404,
                f"The model '{model[:200]}' does not exist; this server has: {', '.join(state.names)}",
                param="model",
                code="model_not_found",
            )
        record: RequestRecord = request.state.record
        record.model = model or state.name
        record.request_id = request_id or record.request_id
        return cls(state, lm, record, model or state.name, f"{prefix}-{record.request_id}"[:128], request)

    @property
    def reader(self) -> PromptReader:
        """Reads prompts."""
        return PromptReader(self.lm, self.state.settings)

    @property
    def formats(self) -> Formats:
        """How the model writes calls and reasoning."""
        return self.state.formats

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that responses and chunks begin with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"medusa-{self.state.version}",
        }

    def usage(self) -> dict[str, Any]:
        """Token counts, of what has come so far."""
        record = self.record
        return {
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.answer_tokens,
            "total_tokens": record.prompt_tokens + record.answer_tokens,
            "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
        }

    def metrics(self) -> dict[str, Any]:
        """What Medusa did for this request, and how fast it was."""
        record = self.record
        seconds = time.time() - record.since - (record.first_token_seconds or 0.0)
        drafted = speculative_metrics(record.stats, self.lm.manifest.heads.num_heads)
        decoded = sum(one.num_decoded_tokens for one in record.stats)
        return {
            **({"speculative_decoding": drafted} if drafted["num_spec_steps"] else {}),
            "first_token_seconds": record.first_token_seconds,
            "tokens_per_second": decoded / seconds if seconds > 0 else 0.0,
        }

    def counts(self) -> dict[str, Any]:
        """What stands at the end of a response, once all answers have ended."""
        return {"usage": self.usage(), "metrics": self.metrics()}

    def note_texts(self, prompts: Sequence[Sequence[int]], answers: Sequence[str]) -> None:
        """Note prompts and answers in the record, if the operator wants them in the log."""
        if self.state.settings.log_texts:
            codec = self.lm.codec
            self.record.prompt = "\n".join(codec.decode(ids, skip_special_tokens=False) for ids in prompts)
            self.record.answer = "\n".join(answers)


async def read(request: Request, model: type[Body]) -> Body:
    """The request's body.

    Raises:
        ApiError: it is not what the endpoint takes.
    """
    state: ServerState = request.app.state.server
    with state.bodies.share() as take:
        body = await read_body(request, state.settings.max_body_bytes, state.settings.idle_seconds, take)
        if len(body) <= HEAVY_BYTES:
            return model.of(body)
        await while_connected(request, take_turn(request))
        return await asyncio.to_thread(model.of, body)


async def take_turn(request: Request) -> None:
    """Wait for the turn of a heavy request, unless it has come. It ends with the request at the latest."""
    if not hasattr(request.state, "turn"):
        request.state.turn = await request.app.state.server.turn()


async def begin(call: Call, prompts: Callable[[], Sequence[list[int]]], options: dict[str, Any]) -> Answers:
    """Encode prompts and queue them.

    Args:
        call: the request.
        prompts: encodes the prompts; it runs in a thread.
        options: fields of `GenerationOptions`. Without max_new_tokens, answers may fill the context.

    Raises:
        ApiError: the request can never be answered, or there is no room for it now.
    """
    reader = call.reader

    def prepare() -> tuple[list[list[int]], GenerationOptions]:
        ids = list(prompts())
        room = min(map(reader.room, ids), default=1)
        given = {name: value for name, value in options.items() if value is not None}
        return ids, GenerationOptions.of(**{"max_new_tokens": room, "max_prompt_tokens": reader.longest} | given)

    async def queue() -> Answers:
        if any(options.get(name) is not None for name in STRUCTURES):
            await take_turn(call.request)
        try:
            ids, checked = await asyncio.to_thread(prepare)
        except MedusaError as error:
            raise ApiError.of(error) from error
        call.record.max_tokens = checked.max_new_tokens
        call.num_logprobs = checked_logprobs(ids, checked)
        return await Answers.begin(call.lm, ids, checked, call.record)

    with call.state.beginning():
        answers = await while_connected(call.request, queue())
    if hasattr(call.request.state, "turn"):
        call.request.state.turn.end()
    return answers


def checked_logprobs(prompts: Sequence[Sequence[int]], options: GenerationOptions) -> int:
    """How many log-probabilities a response may tell.

    Raises:
        ApiError: they would fill the memory.
    """
    count = 0
    if options.prompt_logprobs is not None:
        count += sum(map(len, prompts)) * (1 + options.prompt_logprobs)
    if options.logprobs is not None:
        count += len(prompts) * options.n * (options.max_new_tokens or 0) * (1 + options.logprobs)
    if count > MAX_LOGPROBS:
        told = f"the response would have up to {count} log-probabilities; at most {MAX_LOGPROBS} are told: lower max_tokens"
        raise ApiError(400, told, param="logprobs" if options.prompt_logprobs is None else "prompt_logprobs", code="too_much")
    return count


async def while_connected(request: Request, awaited: Awaitable[Result]) -> Result:
    """Wait for something as long as the client is there.

    Raises:
        ApiError: with the status 499, if the client goes away. What was awaited is cancelled.
    """
    task = asyncio.ensure_future(awaited)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_GONE, "the client went away before the answer's end")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def as_event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One Server-Sent Event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


def stream(
    call: Call, answers: Answers, events: AsyncIterator[bytes], *, failed: Callable[[ApiError], bytes], last: bytes = DONE
) -> EventSourceResponse:
    """A response of events. Answers end with it, whatever happens.

    Args:
        call: the request.
        answers: under way.
        events: the events, made from the answers.
        failed: the event that tells that the answers cannot be given to their end.
        last: what the stream ends with.
    """

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("request %s failed", call.record.request_id)
            told = error if isinstance(error, ApiError) else failure(call.record.request_id)
            call.record.error = told.message if call.state.settings.log_texts else told.logged
            call.record.finish_reasons = ["error"] * answers.num_answers
            yield failed(told)
        if last:
            yield last

    return AnswerStream(call.state, answers, guarded())


class AnswerStream(EventSourceResponse):
    """A response of events. Its answers end with it, even if its client went away before the first event.

    Args:
        state: the server's.
        answers: under way.
        events: made from the answers.
    """

    def __init__(self, state: ServerState, answers: Answers, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, ping=PING_SECONDS, sep="\n")
        del self.headers["Connection"]  # it is the client's to say, and uvicorn's
        self._state, self._answers = state, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        with self._state.under_way(self._answers):
            async with self._answers:
                await super().__call__(scope, receive, send)


async def whole(request: Request, call: Call, answers: Answers, respond: Callable[[Any], dict[str, Any]]) -> Response:
    """Wait for all answers, and make the response. Answers end with it, whatever happens."""
    with call.state.under_way(answers):
        async with answers:
            results = await while_connected(request, answers.results())
            if call.num_logprobs > FEW_LOGPROBS:  # other streams go on meanwhile
                return await asyncio.to_thread(lambda: JSONResponse(respond(results)))
            return JSONResponse(respond(results))


def failed_event(error: ApiError) -> bytes:
    """The event that tells of an error."""
    return as_event(error.body)
