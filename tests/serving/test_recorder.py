"""What the record says of requests that something else ends: the server's own end, or the proxy of Ray Serve."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from medusa_serve.record import RequestRecord
from medusa_serve.recorder import Recorder


@pytest.mark.parametrize("has_begun", [True, False], ids=["begun", "waiting"])
@pytest.mark.parametrize(("is_ending", "status", "error"), [(True, 503, "shutdown"), (False, 499, None)])
def test_a_cancelled_request_says_who_has_gone(*, has_begun: bool, is_ending: bool, status: int, error: str | None) -> None:
    """Ray's proxy cancels a request whose client has gone, and may do so before the application is told of it."""
    records: list[RequestRecord] = []
    waiting = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        if has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        waiting.set()
        await asyncio.sleep(3600)

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        pass

    async def cancelled() -> None:
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        recorder = Recorder(endless, ["/v1/completions"], lambda: is_ending, records.append)
        task = asyncio.create_task(recorder(scope, receive, send))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    [record] = records
    assert (record.status, record.error) == (status, error)
