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
        started, is_begun, is_ended = time.perf_counter(), False, False

        async def send_noted(message: Message) -> None:
            nonlocal is_begun, is_ended
            if message["type"] == "http.response.start":
                is_begun, record.status = True, message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            elif message["type"] == "http.response.body":
                is_ended = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except ApiError as error:
            record.status, record.error = error.status, error.message
            if not is_begun and error.status != CLIENT_GONE:
                await error.response()(scope, receive, send_noted)
        except asyncio.CancelledError:
            record.status = CLIENT_GONE
            raise
        except Exception as error:
            log.exception("request %s failed", record.request_id)
            record.status, record.error = 500, f"{type(error).__name__}: {error}"
            if is_begun:
                raise
            failure = ApiError(500, f"the server failed; its log tells more of request {record.request_id}", code="internal_error")
            await failure.response()(scope, receive, send_noted)
        finally:
            if not is_ended and record.status < 400:
                record.status = CLIENT_GONE
            record.seconds = time.perf_counter() - started
            self._report(record)

    def _record(self, scope: Scope) -> RequestRecord:
        request = Request(scope)
        asked = request.headers.get("x-request-id", "")
        root = scope.get("root_path", "")
        path = scope["path"].removeprefix(root) if root else scope["path"]
        return RequestRecord(
            asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex,
            scope["method"],
            path if path in self._paths else OTHER,
            scope["client"][0] if scope.get("client") else None,
            request.headers.get("traceparent"),
        )


class Doors:
    """Refuses requests for foreign host names, and requests to the API without a key.

    Args:
        app: the layer below.
        trusted_hosts: see `check_host`.
        keys: see `Keys`.
        open_paths: the paths that need no key.
    """

    def __init__(self, app: ASGIApp, trusted_hosts: Collection[str] | None, keys: Keys, open_paths: Callable[[str], bool]) -> None:
        self._app, self._trusted_hosts, self._keys, self._is_open = app, trusted_hosts, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            headers = Request(scope).headers
            check_host(headers.get("host"), self._trusted_hosts)
            if not self._is_open(scope["path"].removeprefix(scope.get("root_path", ""))):
                self._keys.check(headers.get("authorization"))
        await self._app(scope, receive, send)
