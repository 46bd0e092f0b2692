"""What all endpoints do alike: read the body, wait for answers while the client is there, and write events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse
from starlette.requests import Request

from medusa_runtime import GenerationOptions, MedusaError, MedusaLM
from medusa_serve.answers import Answers
from medusa_serve.errors import CLIENT_GONE, ApiError
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


@dataclass
class Call:
    """One request to an endpoint that answers: what it needs of the server, and what its response begins with."""

    state: ServerState
    lm: MedusaLM
    record: RequestRecord
    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, request: Request, model: str | None, prefix: str) -> Call:
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
        return cls(state, lm, record, model or state.name, f"{prefix}-{record.request_id}"[:128])

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
        decoded = sum(one.num_decoded_tokens for one in record.stats)
        return {
            "speculative_decoding": speculative_metrics(record.stats, self.lm.manifest.heads.num_heads),
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
    settings = request.app.state.server.settings
    return model.of(await read_body(request, settings.max_body_bytes, settings.idle_seconds))


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

    try:
        ids, checked = await asyncio.to_thread(prepare)
    except MedusaError as error:
        raise ApiError.of(error) from error
    call.record.max_tokens = checked.max_new_tokens
    return await Answers.begin(call.lm, ids, checked, call.record)


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
        with call.state.under_way(answers):
            async with answers:
                try:
                    async for event in events:
                        yield event
                except ApiError as error:
                    call.record.error, call.record.finish_reasons = error.message, ["error"] * answers.num_answers
                    yield failed(error)
                if last:
                    yield last

    return EventSourceResponse(guarded(), ping=PING_SECONDS, sep="\n")


async def whole(request: Request, call: Call, answers: Answers, respond: Callable[[Any], Result]) -> Result:
    """Wait for all answers, and make the response. Answers end with it, whatever happens."""
    with call.state.under_way(answers):
        async with answers:
            return respond(await while_connected(request, answers.results()))


def failed_event(error: ApiError) -> bytes:
    """The event that tells of an error."""
    return as_event(error.body)
