"""A client that sends any bytes, slowly, in part, or wrongly."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

SECONDS = 20  # the longest wait for anything


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has to have OpenAI's shape."""
        error: dict[str, Any] = self.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert len(error["message"].splitlines()) == 1
        return error


def request(
    method: str = "GET",
    path: str = "/version",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    host: str = "localhost",
) -> bytes:
    """A request's bytes. Its length is told if it has a body, unless the headers tell it."""
    fields = {"Host": host} | ({"Content-Length": str(len(body)), "Content-Type": "application/json"} if body else {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (fields | (headers or {})).items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chat(**fields: Any) -> bytes:
    """The body of a chat."""
    return json.dumps({"messages": [{"role": "user", "content": "fox"}], "max_tokens": 2, "temperature": 0, **fields}).encode()


class Wire:
    """One connection."""

    def __init__(self, url: str, *, receive_bytes: int | None = None) -> None:
        place = urlsplit(url)
        self.socket = socket.socket(socket.AF_INET6 if ":" in str(place.hostname) else socket.AF_INET)
        self.socket.settimeout(SECONDS)
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.connect((place.hostname, place.port))
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> Self:
        self.socket.sendall(data)
        return self

    def kill(self) -> None:
        """Close with a reset, as a process that was killed may do."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def until(self, mark: bytes) -> bytes:
        """What comes up to a mark; the mark included."""
        while mark not in self._rest:
            if not (data := self.socket.recv(65536)):
                raise EOFError(self._rest)
            self._rest += data
        found, _, self._rest = self._rest.partition(mark)
        return found + mark

    def answer(self, *, has_body: bool = True) -> Answer:
        """One whole response."""
        first, *lines = self.until(b"\r\n\r\n").decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split(" ")[1])
        if not has_body or status in (204, 304) or status < 200:
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, self._chunked())
        length = int(headers["content-length"])
        while len(self._rest) < length:
            self._rest += self.socket.recv(65536)
        body, self._rest = self._rest[:length], self._rest[length:]
        return Answer(status, headers, body)

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.until(b"\r\n"), 16):
            while len(self._rest) < size + 2:
                self._rest += self.socket.recv(65536)
            body, self._rest = body + self._rest[:size], self._rest[size + 2 :]
        self.until(b"\r\n")
        return body

    def ask(self, *parts: bytes) -> Answer:
        return self.send(b"".join(parts)).answer()

    def is_closed(self, seconds: float = SECONDS) -> bool:
        """Whether the server closes the connection within this time, and sends nothing more."""
        self.socket.settimeout(seconds)
        try:
            return not self._rest and self.socket.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


def eventually(condition: Any, seconds: float = SECONDS) -> bool:
    """Whether something becomes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
