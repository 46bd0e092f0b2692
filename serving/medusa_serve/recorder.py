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

from medusa_serve.errors import CLIENT_GONE, ApiError
from medusa_serve.guards.hosts import check_host
from medusa_serve.guards.keys import Keys
from medusa_serve.record import RequestRecord

REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
FILES = "/page"  # the path, in metrics, of the page's own files
OTHER = "other"  # the path, in metrics, of a request for something that is not here
log = logging.getLogger(__name__)


class Recorder:
    """The outermost layer. What is below it finds the record in ``request.state.record``.

    Args:
        app: the layer below.
        paths: the paths that are known; metrics tell these apart.
        report: gets each record, once its request has ended.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str], report: Callable[[RequestRecord], None]) -> None:
        self._app, self._paths, self._report = app, frozenset(paths), report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._record(scope)
        scope.setdefault("state", {})["record"] = record
        sent, started = _Sent(send, record), time.perf_counter()
        try:
            await self._app(scope, receive, sent)
        except asyncio.CancelledError:
            record.status = CLIENT_GONE
            raise
        except Exception as error:  # noqa: BLE001 - it is logged, and the client is told
            await self._tell(error, sent, scope, receive)
        finally:
            if not sent.is_ended and record.status < 400:
                record.status = CLIENT_GONE
            record.seconds = time.perf_counter() - started
            self._report(record)

    async def _tell(self, error: Exception, sent: _Sent, scope: Scope, receive: Receive) -> None:
        """Answer with an error. If the answer has begun already, its connection is closed."""
        record = sent.record
        if isinstance(error, ApiError):
            told, record.error = error, error.message
        else:
            log.error("request %s failed", record.request_id, exc_info=error)
            told = ApiError(
                500, f"the server failed; its log has more about request {record.request_id}", code="internal_error"
            )
            record.error = f"{type(error).__name__}: {error}"
        record.status = told.status
        if sent.is_begun:
            raise error
        if told.status != CLIENT_GONE:
            await told.response()(scope, receive, sent)

    def _record(self, scope: Scope) -> RequestRecord:
        request = Request(scope)
        asked = request.headers.get("x-request-id", "")
        root = scope.get("root_path", "")
        path = scope["path"].removeprefix(root) if root else scope["path"]
        path = FILES if path.startswith(f"{FILES}/") else path
        return RequestRecord(
            asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex,
            scope["method"],
            path if path in self._paths else OTHER,
            scope["client"][0] if scope.get("client") else None,
            request.headers.get("traceparent"),
        )


class _Sent:
    """Sends a response, and notes how far it has come."""

    def __init__(self, send: Send, record: RequestRecord) -> None:
        self._send, self.record = send, record
        self.is_begun = self.is_ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_begun, self.record.status = True, message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.record.request_id.encode())]
        elif message["type"] == "http.response.body":
            self.is_ended = not message.get("more_body", False)
        await self._send(message)


class Doors:
    """Refuses requests for foreign host names, and requests to the API without a key.

    Args:
        app: the layer below.
        trusted_hosts: see `check_host`.
        keys: see `Keys`.
        is_open: whether a path needs no key.
    """

    def __init__(self, app: ASGIApp, trusted_hosts: Collection[str] | None, keys: Keys, is_open: Callable[[str], bool]) -> None:
        self._app, self._trusted_hosts, self._keys, self._is_open = app, trusted_hosts, keys, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            headers = Request(scope).headers
            check_host(headers.get("host"), self._trusted_hosts)
            if not self._is_open(scope["path"].removeprefix(scope.get("root_path", ""))):
                self._keys.check(headers.get("authorization"))
        await self._app(scope, receive, send)
