"""What a new user runs first: the programs in examples/, and each line of Python in docs/embedding.md."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from click.testing import CliRunner, Result
from fastapi.testclient import TestClient

import medusa_runtime
from medusa_runtime import GenerationOptions, GenerationResult, MedusaError, MedusaLM

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "embedding.md"
PROMPTS = ("the quick brown fox", "dog", "a small model learns to speak", "over the lazy dog", "many words at once")
PATIENCE = 20  # seconds; what takes longer has hung


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


@pytest.fixture(scope="module")
def lm(bundle: Path) -> Iterator[MedusaLM]:
    with MedusaLM.from_bundle(bundle) as lm:
        yield lm


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks annotations up there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@contextmanager
def held(lm: MedusaLM) -> Iterator[Callable[[int], None]]:
    """The engine waits before each step. What this gives lets it take so many."""
    allowed, step = threading.Semaphore(0), lm.engine.step

    def one() -> Any:
        allowed.acquire()
        return step()

    lm.engine.step = one
    try:
        yield allowed.release
    finally:
        lm.engine.step = step
        allowed.release()  # for the step that waits


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class TestService:
    """examples/fastapi_service.py."""

    @pytest.fixture
    def service(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        monkeypatch.setenv("MEDUSA_BUNDLE", str(bundle))
        return load("fastapi_service")

    @pytest.fixture
    def client(self, service: ModuleType) -> Iterator[TestClient]:
        with TestClient(service.app) as client:
            yield client

    def test_without_a_bundle_it_ends_with_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MEDUSA_BUNDLE", raising=False)
        with pytest.raises(SystemExit, match=r"^Error: set MEDUSA_BUNDLE to the directory of a bundle$"):
            load("fastapi_service")
        monkeypatch.setenv("MEDUSA_BUNDLE", str(tmp_path / "nowhere"))
        with pytest.raises(SystemExit, match=r"^Error: .*nowhere"):
            load("fastapi_service")

    def test_it_answers_what_the_model_answers(self, client: TestClient, lm: MedusaLM) -> None:
        for asked in ({"prompt": PROMPTS[0]}, {"messages": [{"role": "user", "content": PROMPTS[0]}]}):
            answer = client.post("/generate", json=asked | {"max_new_tokens": 30, "n": 2, "temperature": 0.9, "seed": 5})
            whole = lm.generate(PROMPTS[0], max_new_tokens=30, n=2, temperature=0.9, seed=5)
            told = [(choice["text"], choice["token_ids"], choice["seed"]) for choice in answer.json()["choices"]]
            assert told == [(choice.text, choice.token_ids, 5) for choice in whole.choices]
            assert told[0] != told[1]

    def test_the_stream_gives_the_whole_answer(self, client: TestClient, lm: MedusaLM) -> None:
        answer = client.post("/stream", json={"prompt": PROMPTS[0], "max_new_tokens": 40, "logprobs": 1})
        chunks = [json.loads(line) for line in answer.text.splitlines()]
        whole = lm.generate(PROMPTS[0], max_new_tokens=40)
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert len(chunks) > 5
        assert "".join(chunk["text"] for chunk in chunks) == whole.text
        assert [token for chunk in chunks for token in chunk["token_ids"]] == whole.token_ids
        assert [entry["token_id"] for chunk in chunks for entry in chunk["logprobs"]] == whole.token_ids
        assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]

    @pytest.mark.parametrize("path", ["/generate", "/stream"])
    @pytest.mark.parametrize(
        ("asked", "status", "message"),
        [
            ({"prompt": "x", "max_tokens": 3}, 422, "there is no option max_tokens; did you mean max_new_tokens?"),
            ({"prompt": "x", "temperature": -1}, 422, "temperature is -1; it must be greater than or equal to 0"),
            ({"max_new_tokens": 3}, 422, "a request must have either a prompt or messages"),
            ({"prompt": "x", "messages": []}, 422, "a request must have either a prompt or messages"),
            ({"prompt": "x", "max_new_tokens": 256}, 413, "more than the bundle's 256"),
        ],
    )
    def test_a_request_that_cannot_be_answered_is_told_so(self, client: TestClient, path, asked, status, message) -> None:
        answer = client.post(path, json=asked)
        assert answer.status_code == status
        assert message in answer.json()["error"]
        assert "\n" not in answer.json()["error"]

    def test_a_body_of_the_wrong_form_is_refused(self, client: TestClient) -> None:
        assert client.post("/generate", json={"prompt": 5}).status_code == 422
        assert client.post("/generate", content=b"{").status_code == 422

    def test_a_full_queue_is_told_so_until_there_is_room(self, client: TestClient, service: ModuleType) -> None:
        served = service.app.state.lm
        with held(served):
            handle = served.submit("x", n=128, max_new_tokens=1)
            refused = client.post("/generate", json={"prompt": "x", "n": 9, "max_new_tokens": 1})
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert (
                "128 of 136 answers under way (max_batch_size 8 + max_queue 128), 9 more requested" in refused.json()["error"]
            )
        handle.cancel()
        handle.result(PATIENCE)
        assert client.post("/generate", json={"prompt": "x", "n": 9, "max_new_tokens": 1}).status_code == 200

    def test_a_request_that_fails_is_told_so_and_later_ones_run(
        self, client: TestClient, service: ModuleType, lm: MedusaLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no more")

        asked = {"prompt": PROMPTS[0], "max_new_tokens": 20}
        with monkeypatch.context() as broken:
            broken.setattr("medusa_runtime.decoding.engine.accept_greedy", fail)
            answer = client.post("/generate", json=asked)
            *chunks, last = client.post("/stream", json=asked).text.splitlines()
        assert (answer.status_code, len(chunks)) == (500, 1)  # the prompt's own token came before
        assert answer.json() == json.loads(last) == {"error": "the request failed: RuntimeError: no more"}
        later = client.post("/generate", json=asked).json()["choices"][0]
        assert later["text"] == lm.generate(PROMPTS[0], max_new_tokens=20).text

    def test_a_closed_model_is_told_so(self, service: ModuleType) -> None:
        with TestClient(service.app) as client:
            assert client.post("/generate", json={"prompt": "x", "max_new_tokens": 1}).status_code == 200
        answer = client.post("/generate", json={"prompt": "x"})
        assert (answer.status_code, answer.json()) == (503, {"error": "this model is closed"})

    def test_a_request_that_waits_too_long_is_told_so(self, client: TestClient, service: ModuleType) -> None:
        served = service.app.state.lm
        with held(served) as allow:
            handle = served.submit("x", n=8, max_new_tokens=100, ignore_eos=True)
            allow(1)  # all slots are taken
            wait_until(lambda: served.stats().num_active == 8)
            with futures.ThreadPoolExecutor(1) as pool:
                asked = {"prompt": "x", "max_new_tokens": 1, "max_queue_seconds": 0}
                answer = pool.submit(client.post, "/generate", json=asked)
                wait_until(lambda: served.stats().num_waiting == 1)
                allow(2)  # the step that had begun, and one that knows of the new request
                refused = answer.result(PATIENCE)
            handle.cancel()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json() == {"error": "the request waited 0 s for a slot (max_queue_seconds)"}

    def test_health(self, service: ModuleType) -> None:
        started = time.time()
        with TestClient(service.app) as client:
            answer = client.get("/health")
            assert (answer.status_code, answer.json()["is_alive"], answer.json()["why_not"]) == (200, True, None)
            assert started <= answer.json()["since"] <= time.time()
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["is_alive"]) == (503, False)
        assert answer.json()["why_not"] == "this model is closed"

    def test_the_event_loop_goes_on_while_a_prompt_is_tokenised(
        self, client: TestClient, service: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        codec, begun, allowed = service.app.state.lm.codec, threading.Event(), threading.Event()
        encode = codec.encode

        def slow(*args: Any, **kwargs: Any) -> list[int]:
            begun.set()
            assert allowed.wait(PATIENCE)
            return encode(*args, **kwargs)

        monkeypatch.setattr(codec, "encode", slow)
        with futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.post, "/generate", json={"prompt": "x", "max_new_tokens": 1})
            assert begun.wait(PATIENCE)
            try:
                assert page(client, "/stats")["num_completed"] == 0
            finally:
                allowed.set()
            assert answer.result(PATIENCE).status_code == 200

    def test_statistics(self, client: TestClient) -> None:
        before = client.get("/stats").json()
        client.post("/generate", json={"prompt": "x", "max_new_tokens": 7, "ignore_eos": True})
        after = client.get("/stats").json()
        assert (before["num_completed"], before["max_batch_size"]) == (0, 8)
        assert (after["num_completed"], after["decoding"]["num_generated_tokens"]) == (1, 7)

    def test_a_client_that_goes_away_frees_its_slot(self, service: ModuleType) -> None:
        left = threading.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await service.app(scope, receive, send)
            if scope.get("path") == "/stream":
                left.set()

        with serving(app) as port, held(service.app.state.lm) as allow:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
                body = json.dumps({"prompt": "x", "max_new_tokens": 200, "ignore_eos": True})
                connection.request("POST", "/stream", body, {"Content-Type": "application/json"})
                allow(3)
                with connection.getresponse() as stream:
                    assert [json.loads(stream.readline())["finish_reason"] for _ in range(3)] == [None] * 3
                    assert service.app.state.lm.stats().num_active == 1
            assert left.wait(PATIENCE)
            allow(1)  # the one that the engine waits for; the next would decode the request further
            wait_until(lambda: service.app.state.lm.stats().num_cancelled)
            stats = service.app.state.lm.stats()
            assert (stats.num_cancelled, stats.num_active, stats.num_waiting, stats.num_completed) == (1, 0, 0, 0)

    def test_it_is_safe_under_servers_that_tell_of_it_when_sending(self, service: ModuleType, client: TestClient) -> None:
        """From version 2.4 of the ASGI specification on, a send to a client that has gone raises OSError."""
        import asyncio

        from starlette.requests import ClientDisconnect

        served, body = service.app.state.lm, json.dumps({"prompt": "x", "max_new_tokens": 200, "ignore_eos": True})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": "POST",
            "path": "/stream",
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body.encode()}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                raise OSError

        async def request() -> None:
            with pytest.raises(ClientDisconnect):
                await service.app(scope, receive, send)

        with held(served) as allow:
            allow(1)
            asyncio.run(request())
            allow(1)
            wait_until(lambda: served.stats().num_cancelled)
        assert served.stats().num_active == 0


def page(client: TestClient, path: str) -> Any:
    """A page, asked for in a thread of its own, so that a service that hangs fails the test instead of stopping it."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(client.get(path).json()), daemon=True)
    thread.start()
    thread.join(PATIENCE / 4)
    assert found, "the event loop stands still"
    return found[0]


@contextmanager
def serving(app: Any) -> Iterator[int]:
    """An application on a real server; gives its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


class TestBatchJob:
    """examples/batch_job.py."""

    @staticmethod
    def run(*words: object) -> Result:
        return CliRunner().invoke(load("batch_job").main, [str(word) for word in words])

    def test_every_prompt_is_answered_in_order(self, bundle: Path, lm: MedusaLM, tmp_path: Path) -> None:
        prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
        prompts.write_text("\n".join([*PROMPTS[:2], "", *PROMPTS[2:]]) + "\n")
        program = [sys.executable, ROOT / "examples" / "batch_job.py", bundle, prompts, "-o", output]
        settings = ["--max-new-tokens", "20", "--max-batch-size", "2", "--max-queue", "1"]
        done = subprocess.run([*program, *settings], capture_output=True, text=True, check=True)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        whole = [lm.generate(prompt, max_new_tokens=20) for prompt in PROMPTS]
        assert [row["prompt"] for row in rows] == list(PROMPTS)
        assert [row["answer"] for row in rows] == [result.text for result in whole]
        assert [row["num_tokens"] for row in rows] == [len(result.token_ids) for result in whole]
        assert done.stdout == ""
        total = sum(len(result.token_ids) for result in whole)
        told = re.fullmatch(
            rf"5 of 5 prompts answered: {total} tokens in \S+ s, \S+ tokens/s, (\S+) tokens/step\n", done.stderr
        )
        assert told is not None
        assert float(told[1]) >= 1  # how many it is depends on what pays at the moment

    def test_no_more_is_under_way_than_the_queue_takes(self, bundle: Path) -> None:
        job, read = load("batch_job"), []

        def rows() -> Iterator[dict[str, str]]:
            for prompt in PROMPTS:
                read.append(prompt)
                yield {"prompt": prompt}

        with MedusaLM.from_bundle(bundle, max_batch_size=1, max_queue=1) as small:
            answers = job.answers(small, rows(), GenerationOptions(max_new_tokens=4), 2)
            for number, answer in enumerate(answers, 1):
                assert isinstance(answer, GenerationResult)
                assert len(read) == min(number + 2, len(PROMPTS))
            assert small.stats().num_refused == 0

    def test_what_cannot_be_answered_does_not_stop_the_others(self, bundle: Path, lm: MedusaLM, tmp_path: Path) -> None:
        prompts = tmp_path / "prompts.jsonl"
        asked = [
            {"prompt": "word " * 400, "id": "long"},
            {"messages": [{"role": "user", "content": "dog"}], "id": 7},
            {"messages": ["dog"]},
        ]
        prompts.write_text("\n".join(map(json.dumps, asked)))
        result = self.run(bundle, prompts, "--max-new-tokens", 8)
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.exit_code == 0
        assert "more than the bundle's 256" in rows[0]["error"]
        assert "a message is an object with role and content" in rows[2]["error"]
        assert (rows[1]["id"], rows[1]["answer"]) == (7, lm.generate("dog", max_new_tokens=8).text)
        assert result.stderr.startswith("1 of 3 prompts answered")

    @pytest.mark.parametrize(
        ("line", "options", "exit_code", "message"),
        [
            ("{", [], 2, "prompts.jsonl:1 is not JSON"),
            ("caf\udce9", [], 2, "prompts.jsonl is not UTF-8 text"),
            ('{"text": "x"}', [], 2, "prompts.jsonl:1 has neither a prompt nor messages"),
            ('{"prompt": 5}', [], 2, "prompts.jsonl:1 has neither a prompt nor messages"),
            ('{"prompt": "x"}', ["--temperature", -1], 1, "temperature is -1.0; it must be greater than or equal to 0"),
        ],
    )
    def test_bad_input_is_told_in_one_line(self, bundle: Path, tmp_path: Path, line, options, exit_code, message) -> None:
        (tmp_path / "prompts.jsonl").write_bytes(line.encode(errors="surrogateescape"))
        result = self.run(bundle, tmp_path / "prompts.jsonl", *options)
        assert (result.exit_code, result.stdout) == (exit_code, "")
        assert message in result.stderr.splitlines()[-1]


class TestTokenLoop:
    """examples/token_loop.py."""

    @staticmethod
    def run(*words: object) -> Result:
        return CliRunner().invoke(load("token_loop").main, [str(word) for word in words])

    def test_its_steps_make_the_tokens_of_the_engine(self, bundle: Path, lm: MedusaLM) -> None:
        prompts = [lm.codec.encode(prompt) for prompt in PROMPTS]
        result = self.run(bundle, *(",".join(map(str, ids)) for ids in prompts), "--max-new-tokens", 24, "--max-batch-size", 2)
        assert result.exit_code == 0, result.output
        tokens: dict[str, list[int]] = {}
        for number, accepted, bonus in re.findall(r"^(\d+): (\[.*?\]) \+ (\[.*?\])", result.stdout, re.MULTILINE):
            tokens.setdefault(number, []).extend(json.loads(accepted) + json.loads(bonus))
        totals = dict(re.findall(r"^(\d+)= (\[.*\])$", result.stdout, re.MULTILINE))
        assert tokens == {number: json.loads(total) for number, total in totals.items()}
        for number, prompt in enumerate(PROMPTS):
            assert tokens[str(number)] == lm.generate(prompt, max_new_tokens=24).token_ids

    def test_bad_input_is_told_in_one_line(self, bundle: Path) -> None:
        result = self.run(bundle, "5,x")
        assert (result.exit_code, "'x'" in result.stderr.splitlines()[-1]) == (2, True)
        result = self.run(bundle, "5,9999")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "Error: the prompt holds a token id outside the vocabulary of 320\n"


class TestGuide:
    """docs/embedding.md."""

    @staticmethod
    def programs() -> list[str]:
        """Its Python blocks, each behind as many empty lines as stand before it, so that an error names the right one."""
        text = GUIDE.read_text()
        found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        return ["\n" * text[: match.start(1)].count("\n") + match.group(1) for match in found]

    def test_every_line_of_python_runs(
        self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        placeholder = '"build/smollm2-135m-instruct-fp32"'
        first, *others = self.programs()
        assert first.count(placeholder) == 1
        monkeypatch.chdir(tmp_path)
        session: dict[str, Any] = {"__name__": "guide"}
        for program in (first.replace(placeholder, repr(str(bundle))), *others):
            exec(compile(program, str(GUIDE), "exec"), session)
        with session["lm"]:
            assert session["city"].keys() == {"city", "is_capital"}
            assert session["verdict"] in {"yes", "no"}
            assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", session["day"])
            assert len({choice.text for choice in session["colours"].choices}) == 3
            assert session["second"].stats.num_cached_tokens > 10
            assert session["answer"].finish_reason in {"cancelled", "length", "stop"}
            assert session["stats"].num_cancelled >= 1
            assert len(session["scored"].prompt_logprobs) == len(session["text"]) - 1
            assert (session["scored"].token_ids, session["hurried"].finish_reason) == ([], "length")
            assert session["health"].is_alive
        assert "there is no option max_tokens; did you mean max_new_tokens?" in capsys.readouterr().out

    def test_its_table_has_every_option(self) -> None:
        def default(value: object) -> object:
            return "none" if value in (None, (), {}) else value

        asked = [
            f"| `{name}` | {default(field.get_default(call_default_factory=True))} | {field.description} |"
            for name, field in GenerationOptions.model_fields.items()
        ]
        rows = GUIDE.read_text().split("| option | default | meaning |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
        assert rows == asked

    def test_its_table_has_every_logger(self) -> None:
        rows = GUIDE.read_text().split("| logger | level | message |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
        told = {row.split("`")[1] for row in rows}
        sources = ROOT / "runtime" / "medusa_runtime"
        loggers = {
            ".".join(path.relative_to(sources.parent).with_suffix("").parts)
            for path in sources.rglob("*.py")
            if "getLogger(__name__)" in path.read_text()
        }
        groups = tuple(name.removesuffix("…") for name in told if name.endswith("…"))
        assert {name for name in told if not name.endswith("…")} <= loggers
        assert {name for name in loggers - told if not name.startswith(groups)} == set()

    def test_its_table_has_every_error(self) -> None:
        rows = GUIDE.read_text().split("| error | when |")[1].split("\n\n")[0]
        errors = {name for name in medusa_runtime.__all__ if name.endswith("Error")} - {MedusaError.__name__}
        assert errors == set(re.findall(r"`(\w+Error)`", rows))
