"""Around every request: its record, its id, and errors as the API tells them."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa_serve.errors import CLIENT_GONE, ApiError, failure
from medusa_serve.guards.hosts import check_host
from medusa_serve.guards.keys import Keys
from medusa_serve.record import RequestRecord

REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
FILES = "/page"  # the path, in metrics, of the page's own files
OTHER = "other"  # the path, in metrics, of a request for something that is not here
log = logging.getLogger(__name__)


def route_path(scope: Scope) -> str:
    """The path of a request, without the one under which a proxy shows the server."""
    path, root = str(scope["path"]), scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


class Recorder:
    """The outermost layer. What is below it finds the record in ``request.state.record``.

    A heavy request's ``request.state.turn`` ends here at the latest.

    Args:
        app: the layer below.
        paths: the paths that are known; metrics tell these apart.
        is_ending: tells whether the server is shutting down.
        report: gets each record, once its request has ended.
    """

    def __init__(
        self, app: ASGIApp, paths: Collection[str], is_ending: Callable[[], bool], report: Callable[[RequestRecord], None]
    ) -> None:
        self._app, self._paths, self._is_ending, self._report = app, frozenset(paths), is_ending, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._record(scope)
        scope.setdefault("state", {})["record"] = record
        exchange, started = _Exchange(scope, receive, send, record), time.perf_counter()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:  # by the server's end, or by Ray's proxy if the client has gone
            record.status = CLIENT_GONE
            if self._is_ending():
                record.status, record.error = 503, record.error or "shutdown"
            raise
        except Exception:  # noqa: BLE001 - `Errors` has logged it; the connection is closed, because the answer has no end
            record.status = 500
        finally:
            if not exchange.is_ended and record.status < 400:
                record.status = CLIENT_GONE
            if (turn := scope["state"].get("turn")) is not None:
                turn.end()
            record.seconds = time.perf_counter() - started
            self._report(record)

    def _record(self, scope: Scope) -> RequestRecord:
        request = Request(scope)
        asked = request.headers.get("x-request-id", "")
        path = route_path(scope)
        path = FILES if path.startswith(f"{FILES}/") else path
        return RequestRecord(
            asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex,
            scope["method"],
            path if path in self._paths else OTHER,
            scope["client"][0] if scope.get("client") else None,
            request.headers.get("traceparent"),
        )


class _Exchange:
    """A request and its response. It notes how far they have come, and adds the request's id to the response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        self._receive, self._send, self._record = receive, send, record
        self._waits = Request(scope).headers.get("expect", "").lower() == "100-continue"  # the client waits to send its body
        self.is_ended = False

    async def receive(self) -> Message:
        """See ASGI."""
        self._waits = False
        return await self._receive()

    async def send(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self._record.request_id.encode())]
            if self._waits:  # the client may send its body now or never; what comes next could be taken for it
                message["headers"].append((b"connection", b"close"))
        elif message["type"] == "http.response.body":
            self.is_ended = not message.get("more_body", False)
        await self._send(message)


class Errors:
    """Answers with the errors of the layers below, in the shape of the API.

    Args:
        app: the layer below.
        with_texts: tell errors to the record as the client sees them, with what they quote of the request.
    """

    def __init__(self, app: ASGIApp, *, with_texts: bool) -> None:
        self._app, self._with_texts = app, with_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        is_begun = False

        async def noted(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            told = self._told(error, scope["state"]["record"])
            if is_begun:
                raise
            if told.status != CLIENT_GONE:
                await told.response()(scope, receive, send)

    def _told(self, error: Exception, record: RequestRecord) -> ApiError:
        if isinstance(error, ApiError):
            told = error
            record.error = error.message if self._with_texts else error.logged
        else:
            log.error("request %s failed", record.request_id, exc_info=error)
            told = failure(record.request_id)
            record.error = type(error).__name__
        record.status = told.status
        return told


class Doors:
    """Refuses requests for foreign host names, and requests to the API without a key.

    Args:
        app: the layer below.
        trusted_hosts: see `check_host`.
        keys: see `Keys`.
        open_paths: the paths that need no key; all others do, those that do not exist included.
    """

    def __init__(self, app: ASGIApp, trusted_hosts: Collection[str] | None, keys: Keys, open_paths: Collection[str]) -> None:
        self._app, self._trusted_hosts, self._keys, self._open_paths = app, trusted_hosts, keys, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            headers = Request(scope).headers
            check_host(headers.get("host"), self._trusted_hosts)
            if route_path(scope) not in self._open_paths:
                self._keys.check(headers.get("authorization"))
        await self._app(scope, receive, send)
