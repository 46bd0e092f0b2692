"""The load on an HTTP server, from a process of its own: streams of chat completions, kept up, broken off, unread or malformed.

`over_http.py` and `http_soak.py` start it. It writes down when bytes come, and reads what they say afterwards, so that it takes
little time from the server on the same machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from answer_times import timed
from request_loop import Operations, serve

PATH = "/v1/chat/completions"
SLOW_BUFFER, SLOW_SECONDS = 4096, 300.0
TIMEOUT = aiohttp.ClientTimeout(total=600)
MALFORMED = (b"", b"{", b"[]", b'{"messages": 1}', b'{"messages": [], "no_such_field": 1}', b"\xff\xfe", b'{"messages": [{}]}')


@dataclass
class Watched:
    """An answer, and when its parts came."""

    started: float
    parts: list[tuple[float, bytes]] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """Text, tokens and times of the answer. A server that does not tell the number of tokens sends one a chunk."""
        times, texts, tokens, buffered = [], [], None, b""
        for when, part in self.parts:
            *events, buffered = (buffered + part).split(b"\n\n")
            for event in [json.loads(line[6:]) for one in events for line in one.splitlines() if line.startswith(b"data: {")]:
                if "error" in event:
                    raise RuntimeError(f"the server told an error: {event['error']}")
                text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                if text:
                    times.append(when)
                    texts.append(text)
        if not times:
            raise RuntimeError("the server sent no text")
        return timed(self.started, times, "".join(texts), len(texts) if tokens is None else tokens)


async def ask(session: aiohttp.ClientSession, body: dict[str, Any]) -> Watched:
    """Send a request, and take its answer as it comes."""
    watched = Watched(time.perf_counter())
    async with session.post(PATH, json=body | {"stream": True}) as response:
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {(await response.text())[:200]}")
        async for part in response.content.iter_any():
            watched.parts.append((time.perf_counter(), part))
    return watched


async def side_by_side(streams: int, work: Callable[[], Awaitable[bool]]) -> None:
    """Repeat work in several streams, each until it returns False."""

    async def one() -> None:
        while await work():
            pass

    await asyncio.gather(*(one() for _ in range(streams)))


def session_of(url: str, *, buffer: int = 0, keeps: bool = True) -> aiohttp.ClientSession:
    """A session that has as many connections as are asked for.

    Args:
        url: of the server.
        buffer: bytes that the system takes unread; 0 for its own.
        keeps: use a connection for more than one request. llama-server ends connections without saying so.
    """

    def connected(address: Any) -> socket.socket:
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        if buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        return made

    connector = aiohttp.TCPConnector(limit=0, socket_factory=connected, force_close=not keeps)
    return aiohttp.ClientSession(url, connector=connector, timeout=TIMEOUT)


def load(url: str, prompts: list[str], streams: int, fields: dict[str, Any], *, keeps: bool = True) -> dict[str, Any]:
    """Have all prompts answered, `streams` at a time."""

    async def run() -> tuple[float, list[Watched]]:
        waiting, answers = list(enumerate(prompts)), {}

        async def work() -> bool:
            if not waiting:
                return False
            number, prompt = waiting.pop(0)
            answers[number] = await ask(session, {"messages": [{"role": "user", "content": prompt}], **fields})
            return True

        async with session_of(url, keeps=keeps) as session:
            started = time.perf_counter()
            await side_by_side(streams, work)
            return time.perf_counter() - started, [answers[number] for number in range(len(prompts))]

    seconds, answers = asyncio.run(run())
    return {"seconds": seconds, "answers": [one.told() for one in answers]}


def soak(url: str, prompts: list[str], streams: int, seconds: float, seed: int) -> dict[str, Any]:
    """Random requests for some time: how many were answered, and what went wrong."""
    rng, end = random.Random(seed), time.perf_counter() + seconds
    counts: Counter[str] = Counter()

    async def run() -> None:
        async def work() -> bool:
            body = {"messages": [{"role": "user", "content": " ".join(rng.sample(prompts, rng.randint(1, 4)))}]}
            body |= {
                "max_tokens": rng.randint(1, 160),
                "temperature": rng.choice([0, 0, 0.8]),
                "ignore_eos": rng.random() < 0.5,
            }
            try:
                answer = (await ask(session, body | {"stream_options": {"include_usage": True}})).told()
                counts["answered"] += 1
                counts["tokens"] += answer["tokens"]
            except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
                counts[f"error: {type(error).__name__}: {error}"[:200]] += 1
            return time.perf_counter() < end

        async with session_of(url) as session:
            await side_by_side(streams, work)

    asyncio.run(run())
    return dict(counts)


def storm(url: str, kind: str, prompts: list[str], clients: int, streams: int, seed: int, max_bytes: int) -> dict[str, int]:
    """Clients of one kind. Gives the number of each outcome.

    Args:
        url: of the server.
        kind: killed (the connection is cut in the middle of a stream), slow (a long stream is not read until the server cuts
            it off), oversized or malformed.
        prompts: to choose from.
        clients: how many.
        streams: how many at a time.
        seed: of what is random.
        max_bytes: what the server takes as a body.
    """
    rng, counts, left = random.Random(seed), Counter[str](), [clients]
    what = {"killed": _killed, "slow": _slow, "oversized": _oversized, "malformed": _malformed}[kind]

    async def run() -> None:
        async def work() -> bool:
            left[0] -= 1
            if left[0] < 0:
                return False
            body = {"messages": [{"role": "user", "content": rng.choice(prompts)}], "stream": True, "ignore_eos": True}
            try:
                counts[await what(session, body, rng, max_bytes)] += 1
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                counts[type(error).__name__] += 1
            return True

        async with session_of(url, buffer=SLOW_BUFFER if kind == "slow" else 0) as session:
            await side_by_side(streams, work)

    asyncio.run(run())
    return dict(counts)


async def _killed(session: aiohttp.ClientSession, body: dict[str, Any], rng: random.Random, _: int) -> str:
    async with session.post(PATH, json=body | {"max_tokens": 400}) as response:
        if response.status != 200:
            return f"status {response.status}"
        for _ in range(rng.randint(0, 6)):
            await response.content.readany()
        _cut(response)
    return "cut"


async def _slow(session: aiohttp.ClientSession, body: dict[str, Any], _: random.Random, __: int) -> str:
    wide = {
        "max_tokens": 400,
        "n": 4,
        "medusa": {"drafts": True},
        "logprobs": True,
        "top_logprobs": 20,
    }  # more than buffers take
    async with session.post(PATH, json=body | wide) as response:
        if response.status != 200:
            return f"status {response.status}"
        assert response.connection is not None
        assert response.connection.transport is not None
        response.connection.transport.pause_reading()  # type: ignore[attr-defined] # a socket's transport has it
        await _ended_by_the_server(session)
        response.connection.transport.resume_reading()  # type: ignore[attr-defined]
        try:
            received = await response.content.read()
        except (aiohttp.ClientError, OSError):
            return "cut off by the server"
    return "read in the end" if received.rstrip().endswith(b"[DONE]") else "cut off by the server"


async def _ended_by_the_server(session: aiohttp.ClientSession) -> None:
    """Wait until the server has no open stream."""
    deadline = time.monotonic() + SLOW_SECONDS
    while time.monotonic() < deadline:
        await asyncio.sleep(1)
        async with session.get("/metrics") as response:
            if "medusa_open_streams 0" in await response.text():
                return


async def _oversized(session: aiohttp.ClientSession, body: dict[str, Any], _: random.Random, max_bytes: int) -> str:
    body["messages"][0]["content"] = "a" * (max_bytes + 1)
    async with session.post(PATH, json=body) as response:
        return f"status {response.status}"


async def _malformed(session: aiohttp.ClientSession, _: dict[str, Any], rng: random.Random, __: int) -> str:
    async with session.post(PATH, data=rng.choice(MALFORMED), headers={"Content-Type": "application/json"}) as response:
        return f"status {response.status}"


def _cut(response: aiohttp.ClientResponse) -> None:
    """Reset the connection, as the system does for a client that was killed."""
    if response.connection is not None and isinstance(response.connection.transport, asyncio.Transport):
        response.connection.transport.abort()
    response.close()


if __name__ == "__main__":
    operations: Operations = {"load": load, "soak": soak, "storm": storm}
    serve(lambda: operations)
