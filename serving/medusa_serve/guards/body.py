"""Reading the body of a request: JSON alone, of a bounded size, within a bounded time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from medusa_serve.errors import CLIENT_GONE, ApiError

MIN_RATE = 1000  # bytes a second; a client that sends less keeps a connection for nothing


class Budget:
    """Bounds the bytes of all bodies together that are being received or wait to be read.

    Args:
        limit: the most bytes.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """The share of one body. Call what it gives with the number of bytes that have come.

        Raises:
            ApiError: there is no room for them now.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if count > self._left:
                raise ApiError(503, "the server receives too much at once; try again later", code="busy")
            taken, self._left = taken + count, self._left - count

        try:
            yield take
        finally:
            self._left += taken


async def read_body(request: Request, max_bytes: int, idle_seconds: float, take: Callable[[int], None]) -> bytes:
    """The body of a request.

    Args:
        request: not read so far.
        max_bytes: the largest body.
        take: called with the size of each part; see `Budget.share`.
        idle_seconds: how long the client may send nothing. The whole body may take longer, if it comes fast enough.

    Raises:
        ApiError: it is too large, not declared as JSON, or does not come.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith(
        "+json"
    ):  # a browser asks for leave before it sends this kind elsewhere
        found = f"it is {kind[:80]!r}" if kind else "it is missing"
        raise ApiError(415, f"the header Content-Type must be application/json; {found}", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body is compressed; send it as it is", code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body, stream, since = bytearray(), request.stream(), time.monotonic()
    while True:
        left = since + idle_seconds + len(body) / MIN_RATE - time.monotonic()
        try:
            part = await asyncio.wait_for(anext(stream), min(left, idle_seconds))
        except StopAsyncIteration:
            return bytes(body)
        except TimeoutError as error:
            told = f"only {len(body)} bytes of the body came in {time.monotonic() - since:.0f} s"
            raise ApiError(408, told, code="request_timeout", headers={"Connection": "close"}) from error
        except ClientDisconnect as error:
            raise ApiError(CLIENT_GONE, "the client went away before its request was complete") from error
        take(len(part))
        body += part
        if len(body) > max_bytes:
            raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body has more than {max_bytes} bytes, the most that this server takes",
        code="body_too_large",
    )
