"""A tiny server of /v1/chat/completions, to be an endpoint in tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]  # status, and JSON or text


def completion(text: str | None, finish_reason: str = "stop", usage: dict[str, int] | None = None, **more: str) -> Reply:
    message = {"role": "assistant", "content": text, **more}
    choices = [{"index": 0, "finish_reason": finish_reason, "message": message}]
    told = {"id": "1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": choices}
    return 200, told if usage is None else told | {"usage": usage}


def failure(status: int, message: str) -> Reply:
    return status, {"error": {"message": message, "type": "error", "code": None}}


class ChatServer(ThreadingHTTPServer):
    """Answers by `reply`; remembers what it was asked, with which key, and how many requests it had at once."""

    daemon_threads = True

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.now = self.most = 0
        self.counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.counting:
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        found = self.path == "/v1/chat/completions"
        status, content = self.server.reply(body) if found else (404, {"detail": "Not Found"})
        with self.server.counting:
            self.server.now -= 1
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        with suppress(ConnectionError):  # a client that gave up
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def chat_server(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[ChatServer]:
    """Serve until the block ends."""
    with ChatServer(reply) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
