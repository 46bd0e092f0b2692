"""A server that answers from a script, in the stream format that the page at `/` reads. It also serves the page."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from medusa_serve import page

MODEL = {
    "id": "scripted",
    "object": "model",
    "created": 0,
    "owned_by": "tests",
    "medusa": {"num_heads": 4, "backend": "script"},
}


def token(text: str, source: str = "model", depth: int = 0) -> dict[str, Any]:
    return {"id": hash(text) % 50_000, "text": text, "source": source, "depth": depth}


def node(text: str, parent: int, depth: int, probability: float, source: str = "head") -> dict[str, Any]:
    return {
        "id": hash(text) % 50_000,
        "text": text,
        "parent": parent,
        "depth": depth,
        "probability": probability,
        "source": source,
    }


@dataclass(frozen=True)
class Step:
    """What one step gives out."""

    tokens: Sequence[dict[str, Any]]
    nodes: Sequence[dict[str, Any]] = ()  # of its draft; none: the step had no draft
    accepted: Sequence[int] = ()

    @property
    def medusa(self) -> dict[str, Any]:
        draft = {"nodes": list(self.nodes), "accepted": list(self.accepted)} if self.nodes else None
        return {"index": 0, "tokens": list(self.tokens), "draft": draft}


def plain(*texts: str) -> list[Step]:
    """Steps without drafts, a token each."""
    return [Step([token(text)]) for text in texts]


@dataclass
class Script:
    """One answer."""

    steps: Sequence[Step] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""  # of the error, if the status is one
    stream_error: str | None = None  # an error event after the steps
    ending: str = "done"  # "done"; "silent": the stream ends without [DONE]; "cut": the connection breaks
    finish_reason: str = "stop"
    pause: float = 0.0  # seconds before each step
    held: threading.Event | None = None  # steps after the first wait for it


class ScriptedServer:
    """Gives out its scripts one after the other, and remembers what it was asked."""

    def __init__(self, *scripts: Script, api_key: str | None = None) -> None:
        self.scripts = list(scripts)
        self.api_key = api_key
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Event()  # set when a client goes away before its answer's end
        self.url = ""

    def app(self, root_path: str = "") -> Starlette:
        routes = [
            *page.routes(),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        return Starlette(routes=[Mount(root_path, routes=routes)] if root_path else routes)

    def _refusal(self, request: Request) -> Response | None:
        if self.api_key is None or request.headers.get("Authorization") == f"Bearer {self.api_key}":
            return None
        return error(401, "no API key, or a wrong one")

    async def _models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"object": "list", "data": [MODEL]})

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        script = self.scripts.pop(0)
        if script.status != 200:
            return error(script.status, script.message, script.headers)
        return StreamingResponse(self._events(request, script), media_type="text/event-stream")

    async def _events(self, request: Request, script: Script) -> AsyncIterator[str]:
        try:
            yield ": a comment, as servers send them to keep a connection open\r\n\r\n"
            yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            for number, step in enumerate(script.steps):
                await asyncio.sleep(script.pause)
                while number > 0 and script.held is not None and not script.held.is_set():
                    await asyncio.sleep(0.01)
                text = "".join(token["text"] for token in step.tokens)
                yield event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}], medusa=step.medusa)
            if script.ending == "cut":
                raise ConnectionError("the script breaks the connection")
        except asyncio.CancelledError:
            self.left.set()
            raise
        if script.ending == "silent":
            return
        if script.stream_error is not None:
            yield f"data: {json.dumps({'error': {'message': script.stream_error, 'type': 'server_error', 'param': None, 'code': None}})}\n\n"
        else:
            yield event(choices=[{"index": 0, "delta": {}, "finish_reason": script.finish_reason}])
            yield event(
                choices=[], usage={"prompt_tokens": 9, "completion_tokens": sum(len(step.tokens) for step in script.steps)}
            )
        yield "data: [DONE]\n\n"

    @contextmanager
    def serving(self, root_path: str = "") -> Iterator[ScriptedServer]:
        """Serve on a port of loopback that is free, until the block is left."""
        config = uvicorn.Config(
            self.app(root_path), port=0, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1
        )
        with running(config) as port:
            self.url = f"http://127.0.0.1:{port}{root_path}/"
            yield self


@contextmanager
def running(config: uvicorn.Config) -> Iterator[int]:
    """Run a server in a thread. Yields its port."""
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def event(**fields: Any) -> str:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": MODEL["id"], **fields}
    return f"data: {json.dumps(chunk)}\r\n\r\n"


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "error", "param": None, "code": None}}, status, headers)
