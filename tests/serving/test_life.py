"""The life of a server: loading, ending while requests run, failing, full queues, and clients that go away or do not read."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx2
import psutil
import pytest

from medusa_runtime import Manifest, MedusaLM, choose_backend
from medusa_serve.state import ServedBundle
from tests.support.raw_http import Wire, chat, eventually, request
from tests.support.server import Running, serving, serving_model

CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 200, "ignore_eos": True}  # it fills the tiny model's context
JSON = {"Content-Type": "application/json"}


def post(**fields: Any) -> bytes:
    return request("POST", CHAT, {}, chat(**fields))


class Brake:
    """Holds every step of a backend until it is let go."""

    def __init__(self, running: Running) -> None:
        self._backend = running.lm.engine.backend
        self._step = self._backend.step
        self.goes = threading.Event()
        self.failure: BaseException | None = None

    def __enter__(self) -> Self:
        def step(*args: Any, **words: Any) -> Any:
            assert self.goes.wait(30)
            if self.failure is not None:
                raise self.failure
            return self._step(*args, **words)

        self._backend.step = step  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.goes.set()
        self._backend.step = self._step  # type: ignore[method-assign]


class Background:
    """A request in a thread of its own."""

    def __init__(self, url: str, body: bytes) -> None:
        self.response: httpx2.Response | None = None
        self._thread = threading.Thread(target=self._run, args=(url, body))
        self._thread.start()

    def _run(self, url: str, body: bytes) -> None:
        with httpx2.Client(timeout=60) as client:
            self.response = client.post(url + CHAT, content=body, headers=JSON)

    def wait(self) -> httpx2.Response:
        self._thread.join(60)
        assert self.response is not None
        return self.response


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


# Loading


@contextmanager
def loading(bundle: Path, opens: threading.Event, failure: Exception | None = None, **settings: Any) -> Iterator[Running]:
    """A server whose model is loaded once `opens` is set."""
    manifest = Manifest.load(bundle)
    placement = choose_backend(manifest)

    def open_model() -> MedusaLM:
        assert opens.wait(30)
        if failure is not None:
            raise failure
        return MedusaLM.from_bundle(bundle, placement.backend)

    with serving_model(ServedBundle(manifest, placement, open_model), ready=False, **settings) as running:
        yield running


def test_while_it_loads_a_server_is_alive_and_not_ready(tools_bundle: Path) -> None:
    opens = threading.Event()
    with loading(tools_bundle, opens) as running:
        client = running.client
        assert client.get("/health").json() == {"status": "ok", "reason": None}
        response = client.get("/ready")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
        assert response.headers["retry-after"] == "1"
        assert client.get("/v1/models").status_code == 200
        assert client.get("/metrics").status_code == 200
        refused = client.post(CHAT, content=chat(), headers=JSON)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert "being loaded" in refused.json()["error"]["message"]
        opens.set()
        assert eventually(lambda: client.get("/ready").status_code == 200)
        assert client.post(CHAT, content=chat(), headers=JSON).status_code == 200


def test_a_server_that_ends_while_it_loads_does_not_wait(tools_bundle: Path) -> None:
    opens, before = threading.Event(), set(threading.enumerate())
    since = time.monotonic()
    with loading(tools_bundle, opens) as running:
        assert running.client.get("/health").status_code == 200
    assert time.monotonic() - since < 10
    assert running.server.is_loading
    opens.set()
    assert eventually(lambda: not {thread for thread in threading.enumerate() if thread not in before})  # it is closed


def test_a_model_that_cannot_be_loaded_ends_the_server(tools_bundle: Path) -> None:
    opens = threading.Event()
    with loading(tools_bundle, opens, RuntimeError("no such graph")) as running:
        opens.set()
        assert eventually(lambda: running.server.should_exit)
        assert isinstance(running.server.state.failure, RuntimeError)


# A process of its own


class Process:
    """`medusa-export serve`, as people start it."""

    def __init__(self, bundle: Path, tmp_path: Path, *flags: str) -> None:
        self.log = tmp_path / "access.log"
        self._errors = (tmp_path / "errors").open("w+", encoding="utf-8")
        program = "from medusa_export.cli import main; main()"
        command = [sys.executable, "-c", program, "serve", str(bundle), "--port", "0", "--access-log", str(self.log), *flags]
        self.process = subprocess.Popen(command, stderr=self._errors, encoding="utf-8")
        self.url = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._errors.close()

    def wait_until_ready(self) -> Process:
        assert eventually(lambda: "listening on " in self.errors, 60), self.errors
        self.url = self.errors.partition("listening on ")[2].splitlines()[0]
        assert eventually(lambda: httpx2.get(self.url + "/ready").status_code == 200, 60)
        return self

    @property
    def errors(self) -> str:
        return Path(self._errors.name).read_text(encoding="utf-8")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]


def test_a_bundle_that_is_damaged_ends_the_process_with_one_line(tools_bundle: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tools_bundle, damaged)
    (damaged / "weights.bin").write_bytes(b"\0" * (damaged / "weights.bin").stat().st_size)
    with Process(damaged, tmp_path) as process:
        assert process.process.wait(60) == 1
        assert "Traceback" not in process.errors
        [line] = [line for line in process.errors.splitlines() if line.startswith("Error")]
        assert "weights.bin" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_end(tools_bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Requests that run get their whole answers, new ones 503, and the process ends with 0."""
    with Process(tools_bundle, tmp_path, "--max-batch-size", "2", "--grace", "30").wait_until_ready() as process:
        with Wire(process.url) as late:
            assert late.ask(request()).status == 200
            bodies = [chat(n=8, stream=streams, **LONG) for streams in (True, False) for _ in range(3)]
            running = [Background(process.url, body) for body in bodies]
            assert eventually(lambda: _metric(process.url, "num_requests_waiting") > 40)  # all of them have come
            process.process.send_signal(number)
            answer = late.ask(post())
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert answer.error["code"] == "not_ready"
            assert late.ask(request(path="/ready")).status == 503
            assert late.ask(request(path="/health")).status == 200
        responses = [one.wait() for one in running]
        assert process.process.wait(30) == 0
    assert [response.status_code for response in responses] == [200] * 6
    for response in responses[:3]:
        told = events(response.text)
        assert told[-1] == "[DONE]"
        assert not any("error" in one for one in told[:-1])
    assert all(len(response.json()["choices"]) == 8 for response in responses[3:])
    assert "Traceback" not in process.errors
    finished = [line for line in process.lines() if line["path"] == CHAT]
    assert sorted(line["status"] for line in finished) == [200] * 6 + [503]


def _metric(url: str, name: str) -> float:
    text = httpx2.get(url + "/metrics").text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"vllm:{name}"))


def test_after_the_grace_requests_are_ended_properly(tools_bundle: Path, tmp_path: Path) -> None:
    with Process(tools_bundle, tmp_path, "--max-batch-size", "1", "--grace", "0").wait_until_ready() as process:
        streams = [Background(process.url, chat(n=20, stream=True, **LONG)) for _ in range(2)]
        wholes = [Background(process.url, chat(n=20, **LONG)) for _ in range(2)]
        assert eventually(lambda: _metric(process.url, "num_requests_waiting") > 60)
        process.process.send_signal(signal.SIGTERM)
        for one in streams:
            *_, error, last = events(one.wait().text)
            assert last == "[DONE]"
            assert error["error"]["code"] == "shutdown"
        for one in wholes:
            response = one.wait()
            assert (response.status_code, response.json()["error"]["code"]) == (503, "shutdown")
            assert response.headers["retry-after"] == "1"
        assert process.process.wait(30) == 0
        assert "Traceback" not in process.errors


def test_a_second_signal_ends_requests_at_once(tools_bundle: Path, tmp_path: Path) -> None:
    with Process(tools_bundle, tmp_path, "--max-batch-size", "1", "--grace", "1000").wait_until_ready() as process:
        streams = [Background(process.url, chat(n=40, stream=True, **LONG)) for _ in range(2)]
        assert eventually(lambda: _metric(process.url, "num_requests_waiting") > 40)
        process.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx2.get(process.url + "/ready").status_code == 503)
        process.process.send_signal(signal.SIGTERM)
        for one in streams:
            *_, error, last = events(one.wait().text)
            assert (error["error"]["code"], last) == ("shutdown", "[DONE]")
        assert process.process.wait(20) == 0


# The thread that decodes dies


class Fatal(BaseException):
    """What no handler of requests catches."""


def test_if_the_thread_that_decodes_dies_everybody_is_told(tools_bundle: Path) -> None:
    logging.getLogger("medusa_runtime").setLevel(logging.CRITICAL)
    try:
        with serving(tools_bundle, max_batch_size=4) as running, Brake(running) as brake:
            stream = Background(running.url, chat(stream=True, **LONG))
            whole = Background(running.url, chat(**LONG))
            assert eventually(lambda: running.server.state.num_under_way == 2)
            brake.failure = Fatal("out of cheese")
            brake.goes.set()
            *_, error, last = events(stream.wait().text)
            assert (error["error"]["type"], last) == ("server_error", "[DONE]")
            assert whole.wait().status_code in (500, 503)
            assert whole.wait().json()["error"]["type"] == "server_error"
            health = running.client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "failed")
            assert running.client.get("/ready").status_code == 503
            refused = running.chat()
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert running.client.get("/metrics").status_code == 200
            assert running.server.state.num_under_way == 0
    finally:
        logging.getLogger("medusa_runtime").setLevel(logging.NOTSET)


def test_a_request_that_fails_fails_alone(tools_bundle: Path) -> None:
    with serving(tools_bundle) as running:
        with Brake(running) as brake:
            failing = Background(running.url, chat(**LONG))
            assert eventually(lambda: running.server.state.num_under_way == 1)
            brake.failure = ValueError("a bug")
            brake.goes.set()
            response = failing.wait()
            assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert running.chat().status_code == 200
        assert running.client.get("/health").status_code == 200


# Full queues


def test_a_full_queue_says_when_to_come_back(tools_bundle: Path) -> None:
    with serving(tools_bundle, max_batch_size=1, max_queue=1) as running, Brake(running) as brake:
        taken = [Background(running.url, chat(**LONG)) for _ in range(2)]
        assert eventually(lambda: running.server.state.num_under_way == 2)
        for words in ({}, {"stream": True}):
            response = running.post(CHAT, json.loads(chat(**words)))
            error = response.json()["error"]
            assert (response.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
            assert response.headers["retry-after"] == "1"
        never = running.post(CHAT, json.loads(chat(n=3)))  # more than there is ever room for
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        several = running.post("/v1/completions", {"prompt": ["a", "b"], "n": 2})
        assert (several.status_code, several.json()["error"]["param"]) == (400, "prompt")
        brake.goes.set()
        assert [one.wait().status_code for one in taken] == [200, 200]
        assert running.chat().status_code == 200


def test_prompts_that_find_no_room_leave_none_behind(tools_bundle: Path) -> None:
    with serving(tools_bundle, max_batch_size=1, max_queue=2) as running, Brake(running) as brake:
        taken = Background(running.url, chat(**LONG))
        assert eventually(lambda: running.server.state.num_under_way == 1)
        refused = running.post("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 2})
        assert refused.status_code == 429
        brake.goes.set()
        assert taken.wait().status_code == 200
        running.wait_until_idle()


# Clients that go away


@contextmanager
def logged(bundle: Path, tmp_path: Path, **words: Any) -> Iterator[tuple[Running, Callable[[], list[dict[str, Any]]]]]:
    """A server, and the lines of its log so far."""
    log = tmp_path / "access.log"

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if '"/v1/' in line]

    with serving(bundle, access_log=str(log), **words) as running:
        yield running, lines


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("is_reset", [True, False], ids=["reset", "closed"])
def test_a_client_that_goes_away_frees_its_slot(tools_bundle: Path, tmp_path: Path, *, streams: bool, is_reset: bool) -> None:
    with logged(tools_bundle, tmp_path, max_batch_size=1) as (running, lines), Brake(running) as brake:
        wire = Wire(running.url).send(post(stream=streams, **LONG))
        assert eventually(lambda: running.lm.stats().num_active == 1)
        wire.kill() if is_reset else wire.socket.close()
        assert eventually(lambda: running.server.state.num_under_way == 0)
        brake.goes.set()
        running.wait_until_idle()
        assert running.lm.stats().num_cancelled == 1
        assert eventually(lambda: [line["status"] for line in lines()] == [499])
        ended = [line for line in running.client.get("/metrics").text.splitlines() if "request_success" in line]
        assert [line.rpartition(" ")[2] for line in ended if 'finished_reason="abort"' in line] == ["1.0"]


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(tools_bundle: Path, tmp_path: Path, *, streams: bool) -> None:
    with logged(tools_bundle, tmp_path, max_batch_size=1, max_queue=1) as (running, lines), Brake(running) as brake:
        first = Background(running.url, chat(max_tokens=3))
        assert eventually(lambda: running.lm.stats().num_active == 1)
        with Wire(running.url).send(post(stream=streams, **LONG)):
            assert eventually(lambda: running.server.state.num_under_way == 2)
        assert eventually(lambda: running.server.state.num_under_way == 1)
        brake.goes.set()
        assert first.wait().status_code == 200
        running.wait_until_idle()
        assert eventually(lambda: sorted(line["status"] for line in lines()) == [200, 499])
        assert running.lm.stats().num_cancelled == 1


def test_a_client_that_goes_away_while_it_sends_is_noted(tools_bundle: Path, tmp_path: Path) -> None:
    with logged(tools_bundle, tmp_path) as (running, lines):
        body = chat()
        with Wire(running.url) as wire:
            wire.send(request("POST", CHAT, {"Content-Length": str(len(body)), **JSON}) + body[:20])
            time.sleep(0.1)
        assert eventually(lambda: [line["status"] for line in lines()] == [499])
        assert running.lm.stats().num_active == 0


def test_a_client_that_goes_away_before_its_prompt_is_read_is_noted(
    tools_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logged(tools_bundle, tmp_path) as (running, lines):
        goes, encode = threading.Event(), running.lm.codec.encode

        def slow(*args: Any, **words: Any) -> list[int]:
            assert goes.wait(30)
            return encode(*args, **words)

        monkeypatch.setattr(running.lm.codec, "encode", slow)
        with Wire(running.url).send(post()):
            time.sleep(0.2)
        assert eventually(lambda: [line["status"] for line in lines()] == [499])
        goes.set()
        running.wait_until_idle()


# Clients that do not read


def test_a_client_that_reads_nothing_is_cut_off(tools_bundle: Path, tmp_path: Path) -> None:
    """Each chunk tells many log-probabilities, so that the buffers of the system are full before the answer ends."""
    with logged(tools_bundle, tmp_path, idle_seconds=0.5) as (running, lines):
        with Wire(running.url, receive_bytes=2048) as wire:
            wire.send(post(stream=True, n=8, logprobs=True, top_logprobs=20, medusa={"drafts": True, "tree_nodes": 64}, **LONG))
            assert eventually(lambda: running.server.state.num_under_way == 1)
            sizes: list[int] = []
            assert eventually(lambda: _has_ended(running, sizes), 30)
            assert eventually(lambda: [line["status"] for line in lines()] == [499])
            assert 1 << 16 < max(sizes) < 1 << 20  # bytes that wait to be sent: bounded, and there were some
        running.wait_until_idle()


def _has_ended(running: Running, sizes: list[int]) -> bool:
    """Whether no answer is under way. Notes how many bytes wait to be sent."""
    sizes += [connection.transport.get_write_buffer_size() for connection in running.server.server_state.connections.copy()]
    return running.server.state.num_under_way == 0


def test_a_client_that_does_not_read_its_whole_answer_is_cut_off(tools_bundle: Path) -> None:
    with serving(tools_bundle, idle_seconds=1.0, max_batch_size=8) as running, Wire(running.url, receive_bytes=2048) as wire:
        wire.send(post(n=8, logprobs=True, top_logprobs=20, **LONG))
        assert eventually(lambda: running.server.state.num_under_way == 1)
        assert eventually(lambda: running.server.state.num_under_way == 0)
        assert eventually(lambda: len(running.server.server_state.connections) == 1, 10)  # that of `running.client`
        running.wait_until_idle()


# Nothing is left behind


def test_clients_killed_in_mid_stream_leave_nothing_behind(tools_bundle: Path) -> None:
    process = psutil.Process()
    with serving(tools_bundle, max_batch_size=4, max_queue=200) as running:
        running.chat(stream=True)  # the first stream starts a task of sse-starlette that stays
        running.wait_until_idle()
        before = process.num_fds(), threading.active_count(), _num_tasks(running)
        expected = running.chat(max_tokens=20).json()["choices"][0]["message"]["content"]
        for round_ in range(5):
            wires = [Wire(running.url).send(post(stream=place % 2 == 0, **LONG)) for place in range(20)]
            wires[0].until(b"data:")
            for place, wire in enumerate(wires):
                wire.kill() if (place + round_) % 3 else wire.socket.close()
        running.wait_until_idle()
        assert running.server.state.num_under_way == 0
        assert running.chat(max_tokens=20).json()["choices"][0]["message"]["content"] == expected
        assert eventually(lambda: len(running.server.server_state.connections) == 1)
        assert eventually(lambda: _num_tasks(running) <= before[2])
        assert eventually(lambda: process.num_fds() <= before[0])
        assert threading.active_count() <= before[1]
        assert running.lm.stats().num_active == running.lm.stats().num_waiting == 0


def _num_tasks(running: Running) -> int:
    loop = running.server._loop
    assert loop is not None
    return len(asyncio.all_tasks(loop))


def test_a_server_that_has_ended_leaves_no_thread_and_no_file_open(tools_bundle: Path) -> None:
    with serving(tools_bundle):
        pass  # what is made once for the process
    process = psutil.Process()
    before = process.num_fds(), {thread.ident for thread in threading.enumerate()}
    with serving(tools_bundle) as running:
        for stream in (True, False):
            assert running.chat(stream=stream).status_code == 200
    assert eventually(lambda: {thread.ident for thread in threading.enumerate()} <= before[1])
    assert eventually(lambda: process.num_fds() <= before[0])
