"""A connection that a client cannot keep for nothing: what it sends is bounded, and the time that it may take."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from medusa_serve.errors import ApiError

MAX_HEAD_BYTES = 1 << 16  # of the request line and all headers, and of trailers
MAX_HEADERS = 256


class GuardedProtocol(HttpToolsProtocol):
    """HTTP by httptools, with the limits that uvicorn lacks.

    A request that comes while another of its connection is being answered is not taken: the connection is closed after that
    answer, as HTTP allows. So a connection has one request at a time, and a client that goes away is noticed.

    Args:
        header_seconds: how long the head of a request may take, and a new connection may be silent.
        idle_seconds: how long a client may take nothing of an answer, or go on to send a body that was refused.
        max_connections: further connections get status 503.
        words: uvicorn's own arguments.
    """

    def __init__(self, *, header_seconds: float, idle_seconds: float, max_connections: int, **words: Any) -> None:
        super().__init__(**words)
        self._header_seconds, self._idle_seconds = header_seconds, idle_seconds
        self._max_connections = max_connections
        self._head_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_bytes = self._num_headers = 0  # of the request's head and trailers
        self._is_in_head = self._is_in_body = self._is_too_large = False
        self._is_upgrading = False  # the client asked for another protocol
        self._is_deaf = False  # nothing that still comes counts

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self._refuse(ApiError(503, "the server has as many connections as it takes", code="too_many_connections"))
        else:
            self._start_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_rest()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        was_in_head = self._is_in_head
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._is_deaf or self.transport.is_closing():
            return
        if self._is_in_head:
            self._num_bytes += len(data) if was_in_head else 0
            if self._num_bytes > MAX_HEAD_BYTES:
                self._refuse(_too_large())
        elif not self._is_answering:
            self._wait_for_rest() if self._is_in_body else self._start_head()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # What the parser finds

    def on_message_begin(self) -> None:
        if self._is_answering:
            self.cycle.keep_alive = False
            self._is_deaf = True
        if self._is_deaf:
            return
        self._is_in_head, self._num_bytes, self._num_headers = True, 0, 0
        self._start_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._is_deaf:
            self._count(len(url), 0)
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_deaf:
            return
        self._count(len(name) + len(value), 1)
        if not self._is_in_body:  # else it is a trailer, which nothing here reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        if self.parser.should_upgrade():  # `_go_on` comes next
            self._is_upgrading = True
            return
        self._end_head()
        super().on_headers_complete()
        self._is_in_body = True

    def on_body(self, body: bytes) -> None:
        if not self._is_deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_deaf or self._is_upgrading:
            return
        self._is_in_body = False
        self._end_rest()
        super().on_message_complete()

    def _count(self, num_bytes: int, num_headers: int) -> None:
        self._num_bytes += num_bytes
        self._num_headers += num_headers
        if self._num_bytes > MAX_HEAD_BYTES or self._num_headers > MAX_HEADERS:
            self._is_too_large = True
            raise ValueError  # the parser stops, and `send_400_response` is called

    def send_400_response(self, msg: str) -> None:
        """The parser has stopped: what came is not HTTP, or too much of it."""
        del msg
        error = ApiError(400, "this is not a request of HTTP/1.1", code="invalid_http")
        if self._is_deaf:
            return
        if not self._is_answering or (self._is_in_body and not self.cycle.response_started):
            self._refuse(_too_large() if self._is_too_large else error)
        elif self._is_in_body:  # its answer has begun, and can no longer be another one
            self.transport.abort()
        else:  # behind a whole request
            self.cycle.keep_alive = False
            self._is_deaf = True

    def _go_on(self, rest: bytes) -> None:
        """Go on with HTTP/1.1 though the client would rather use another protocol. The parser would not even read the body.

        So another parser gets the same request without the wish.
        """
        method = self.parser.get_method()
        if method == b"CONNECT" or self._is_deaf:
            self.send_400_response("")
            return
        fields = [field for field in self.headers if field[0] not in {b"upgrade", b"http2-settings", b"connection"}]
        head = b"".join(b"%s: %s\r\n" % field for field in fields)
        self.parser, self._is_upgrading = httptools.HttpRequestParser(self), False
        self._feed(b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method, self.url, head, rest))

    # Time

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer comes."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._idle_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for too long after an answer. If the client has not read it either, closing would wait for ever."""
        if not self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.transport.abort()
            return
        super().timeout_keep_alive_handler()

    def _start_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._header_seconds, self._give_up_head)

    def _end_head(self) -> None:
        self._is_in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up_head(self) -> None:
        if self._is_in_head:
            told = f"the head of the request did not come within {self._header_seconds:g} s"
            self._refuse(ApiError(408, told, code="request_timeout"))
        else:
            self.transport.close()

    def _wait_for_rest(self) -> None:
        """Read the rest of a body that was refused: a client that still sends it would not see the answer otherwise."""
        if self._rest_timer is None:
            self._rest_timer = self.loop.call_later(self._idle_seconds, self.transport.abort)

    def _end_rest(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answer in place of the application, and close the connection."""
        self._end_head()
        self._is_deaf = True
        body = json.dumps(error.body).encode()
        fields = {"Content-Type": "application/json", "Content-Length": len(body), "Connection": "close", **error.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        status = HTTPStatus(error.status)
        self.transport.write(f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n".encode() + body)
        self.transport.close()


def _too_large() -> ApiError:
    told = f"the head of the request has more than {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} headers"
    return ApiError(431, told, code="head_too_large")
