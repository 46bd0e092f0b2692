"""Answers one request of Triton: its responses go to the request's response sender."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # only Triton has it

from medusa_runtime import (
    CapacityError,
    ClosedError,
    DeviceLostError,
    GenerationResult,
    Handle,
    MedusaError,
    MedusaLM,
    MissingExtraError,
    OptionError,
    QueueFullError,
    QueueTimeoutError,
    TreeError,
)
from medusa_serve.errors import ApiError
from medusa_serve.spelling import Speller
from medusa_serve.triton.request import Asked
from medusa_serve.triton.responses import Part, make_tensors

CHECK_SECONDS = 0.05  # how often it is asked whether the client has gone


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Sender:
    """The response sender of one request. Exactly one response is the last."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self._has_ended = False

    @property
    def client_is_gone(self) -> bool:
        """Whether the request was cancelled."""
        return bool(self._sender.is_cancelled())

    def send(self, tensors: dict[str, Any], *, is_last: bool) -> None:
        """Send a response."""
        outputs = [pb_utils.Tensor(name, values) for name, values in tensors.items()]
        self._send(pb_utils.InferenceResponse(output_tensors=outputs), is_last=is_last)

    def fail(self, error: Exception) -> None:
        """End the answer with an error, unless it has ended."""
        if not self._has_ended:
            told = pb_utils.TritonError(_message(error), _code(error))
            self._send(pb_utils.InferenceResponse(output_tensors=[], error=told), is_last=True)

    def _send(self, response: Any, *, is_last: bool) -> None:
        self._has_ended = is_last
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)


async def answer(lm: MedusaLM, asked: Asked, sender: Sender) -> None:
    """Decode the answers to a request and send them. Whatever goes wrong is told to the client."""
    try:
        if sender.client_is_gone:
            raise ClientGoneError
        async with await lm.asubmit(asked.prompt, asked.options) as handle:
            with _cancelling(handle, sender):
                await (_send_stream if asked.streams else _send_whole)(lm, asked, handle, sender)
    except Exception as error:  # noqa: BLE001 - a request without a last response would never end for its client
        if not isinstance(error, ClientGoneError | MedusaError | ApiError):
            pb_utils.Logger.log_error(f"medusa: a request failed: {error!r}")
        sender.fail(error)


async def _send_stream(lm: MedusaLM, asked: Asked, handle: Handle, sender: Sender) -> None:
    speller, num_open, num_prompt_tokens = Speller(lm.codec), asked.options.n, len(handle.prompt_ids)
    async for chunk in handle:
        num_open -= chunk.finish_reason is not None
        last = handle.result(timeout=0) if num_open == 0 else None
        if sender.client_is_gone:
            raise ClientGoneError
        tensors = make_tensors([Part.of_chunk(chunk)], asked.outputs, speller, num_prompt_tokens, last)
        sender.send(tensors, is_last=last is not None)


async def _send_whole(lm: MedusaLM, asked: Asked, handle: Handle, sender: Sender) -> None:
    result: GenerationResult = await handle.aresult()
    if sender.client_is_gone:
        raise ClientGoneError
    parts = [Part.of_choice(index, choice, asked.echoed) for index, choice in enumerate(result.choices)]
    tensors = make_tensors(parts, asked.outputs, Speller(lm.codec), len(result.prompt_ids), result)
    sender.send(tensors, is_last=True)


@contextlib.contextmanager
def _cancelling(handle: Handle, sender: Sender) -> Iterator[None]:
    """Cancel the request once its client has gone, so that its slot becomes free before the next step."""

    async def watch() -> None:
        while not sender.client_is_gone:
            await asyncio.sleep(CHECK_SECONDS)
        handle.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


def _message(error: Exception) -> str:
    return "the client cancelled the request" if isinstance(error, ClientGoneError) else str(error) or repr(error)


def _code(error: Exception) -> int:
    """Triton's code for an error."""
    if isinstance(error, ApiError):
        kind = "INVALID_ARG" if error.status < 500 else "INTERNAL"
    elif isinstance(error, OptionError | CapacityError | TreeError):
        kind = "INVALID_ARG"
    elif isinstance(error, QueueFullError | QueueTimeoutError | ClosedError | DeviceLostError):
        kind = "UNAVAILABLE"
    elif isinstance(error, MissingExtraError):
        kind = "UNSUPPORTED"
    else:
        kind = "CANCELLED" if isinstance(error, ClientGoneError) else "INTERNAL"
    code: int = getattr(pb_utils.TritonError, kind)
    return code
