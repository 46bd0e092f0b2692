"""What comes from the network is bounded, and refused in OpenAI's shape: bodies, heads, connections and methods."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.raw_http import Wire, chat, eventually, request
from tests.support.server import Running, serving

CHAT = "/v1/chat/completions"
LIMIT = 20_000
QUICK = {"header_seconds": 0.5, "idle_seconds": 1.0, "max_body_bytes": LIMIT}


@pytest.fixture(scope="module")
def server(tools_bundle: Path) -> Iterator[Running]:
    """One that waits for nobody, so that tests need not wait either."""
    with serving(tools_bundle, served_model_name=("tiny",), **QUICK) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture
def wire(server: Running) -> Iterator[Wire]:
    with Wire(server.url) as connection:
        yield connection
    assert server.client.get("/version").status_code == 200


def post(body: bytes, path: str = CHAT, **headers: str) -> bytes:
    return request("POST", path, {name.replace("_", "-"): value for name, value in headers.items()}, body)


# Bodies


def test_a_body_may_come_in_pieces(wire: Wire) -> None:
    body = chat()
    for part in (request("POST", CHAT, {"Content-Length": str(len(body)), "Content-Type": "application/json"}), body[:9]):
        wire.send(part)
        time.sleep(0.05)
    assert wire.ask(body[9:]).status == 200
    chunked = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    wire.send(request("POST", CHAT, chunked))
    for place in range(0, len(body), 7):
        wire.send(b"%x\r\n%s\r\n" % (len(body[place : place + 7]), body[place : place + 7]))
    assert wire.ask(b"0\r\n\r\n").status == 200


def test_a_body_that_says_it_is_too_long_is_refused_before_it_comes(wire: Wire) -> None:
    head = request("POST", CHAT, {"Content-Length": str(LIMIT + 1), "Content-Type": "application/json"})
    answer = wire.ask(head)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert wire.send(b" " * (LIMIT + 1)).ask(request()).status == 200  # the connection goes on behind the body


def test_a_body_that_gets_too_long_is_refused(wire: Wire) -> None:
    wire.send(request("POST", CHAT, {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}))
    for _ in range(LIMIT // 1000 + 1):
        wire.send(b"3e8\r\n" + b" " * 1000 + b"\r\n")
    answer = wire.answer()
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


def test_the_longest_body_is_taken(wire: Wire) -> None:
    body = chat()
    assert wire.ask(post(body + b" " * (LIMIT - len(body)))).status == 200


def test_a_refused_body_that_never_ends_is_cut_off(wire: Wire) -> None:
    wire.send(request("POST", "/nothing", {"Transfer-Encoding": "chunked"}))
    assert wire.answer().status == 404
    with pytest.raises(ConnectionError):
        while True:
            wire.send(b"3e8\r\n" + b" " * 1000 + b"\r\n")
            time.sleep(0.02)


def test_a_large_body_sees_why_it_is_refused(server: Running) -> None:
    response = server.client.post(CHAT, content=b" " * 5_000_000, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
        ("application/jsonx", 415),
        ("text/plain;application/json", 415),
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
    ],
)
def test_only_json_is_taken(wire: Wire, kind: str, status: int) -> None:
    answer = wire.ask(post(chat(), Content_Type=kind))
    assert answer.status == status
    if status == 415:
        assert answer.error["code"] == "unsupported_media_type"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip"])
def test_compressed_bodies_are_refused(wire: Wire, encoding: str) -> None:
    assert wire.ask(post(chat(), Content_Encoding=encoding)).status == 415


DEEP = b"[" * 200 + b"]" * 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"messages": [}',
        b"null",
        b"[]",
        b'"text"',
        b"3",
        b"{}{}",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 1e999}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + DEEP + b"}",
        b'{"messages": [], "tools": ' + DEEP + b"}",
        b"[" * 9000,
        b'{"a":' * 3000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\udfff": 1}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"user": "\xff"}',
        b'\xef\xbb\xbf{"messages": []}',
        '{"messages": [{"role": "user", "content": "x"}]}'.encode("utf-16"),
        '{"messages": [{"role": "user", "content": "x"}]}'.encode("utf-32-le"),
        b'{"max_tokens": 1, "max_tokens": 2}',
        b'{"messages": [{"role": "user", "role": "system", "content": "x"}]}',
        b"{'messages': []}",
        b'{"messages": [],}',
        b'{"user": "a\nb"}',
    ],
    ids=lambda body: repr(body[:24]),
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"])
def test_a_body_that_is_not_json_is_refused(server: Running, path: str, body: bytes) -> None:
    response = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_json")
    assert len(error["message"]) < 300
    assert "sys." not in error["message"]


def test_what_looks_like_bad_json_and_is_good_is_taken(server: Running) -> None:
    body = r'{"messages": [{"role": "user", "content": "\ud83d\ude00 \u0000"}], "max_tokens": 1e0, "temperature": -0.0}'
    response = server.client.post(CHAT, content=body.encode(), headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text


MANY = 4_000  # fits the body; the point is that it takes no time


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [1] * MANY}, "messages.0"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [1] * MANY}, "tools.0"),
        ("/v1/responses", {"input": [1] * MANY}, None),
        ("/v1/completions", {"prompt": [None] * 2000}, None),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]} | {f"f{number}": 1 for number in range(1000)}, None),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "x" * 15_000: 1}, "x" * 80),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "n": "9" * 15_000}, "n"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "logit_bias": {"--5": 1}}, "logit_bias"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "stop": "x" * 1001}, "stop"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "stop_token_ids": [5] * 5000}, "stop_token_ids"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "top_k": 10**30, "seed": 10**30}, "seed"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "medusa": {"tree": {"choices": [[0] * 40]}}}, "medusa.tree"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "guided_regex": "(" * 9000}, None),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "guided_grammar": "start: " + "(" * 9000}, None),
        ("/v1/completions", {"prompt": ["x"] * 13}, "prompt"),
        ("/v1/completions", {"prompt": ""}, None),
    ],
)
def test_what_is_wrong_many_times_is_told_once(server: Running, path: str, body: dict[str, Any], param: str | None) -> None:
    response = server.post(path, body)
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert len(error["message"]) <= 1000
    assert param is None or error["param"] == param


def every_list(schema: Any) -> Iterator[dict[str, Any]]:
    """The schemas of lists within pydantic's own schema of a model."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield schema
        for inner in schema.values():
            yield from every_list(inner)
    elif isinstance(schema, list | tuple):
        for inner in schema:
            yield from every_list(inner)


def test_every_list_of_every_request_is_refused_at_its_first_wrong_item() -> None:
    from medusa_serve.protocol.openapi import OPERATIONS

    models = [operation.request for operation in OPERATIONS if operation.request is not None]
    lists = [one for model in models for one in every_list(model.__pydantic_core_schema__)]
    assert len(lists) > 20
    assert all(one.get("fail_fast") for one in lists)


# Heads


def test_a_silent_connection_is_closed(wire: Wire) -> None:
    assert wire.is_closed()


@pytest.mark.parametrize("before", [[], [request()]], ids=["first", "later"])
def test_a_slow_head_is_given_up(wire: Wire, before: list[bytes]) -> None:
    for one in before:
        assert wire.ask(one).status == 200
    head, since = request(headers={"X-Padding": "x" * 500}), time.monotonic()
    with pytest.raises(ConnectionError):
        for byte in head:
            wire.send(bytes([byte]))
            time.sleep(0.02)
    assert 0.4 < time.monotonic() - since < 5


def test_a_client_whose_head_is_given_up_is_told(wire: Wire) -> None:
    answer = wire.ask(b"GET /version HTTP/1.1\r\nHost: local")
    assert (answer.status, answer.error["code"], answer.headers["connection"]) == (408, "request_timeout", "close")
    assert wire.is_closed()


def test_an_idle_connection_is_closed(wire: Wire) -> None:
    assert wire.ask(request()).status == 200
    assert not wire.is_closed(0.7)
    assert wire.is_closed()


def test_empty_lines_keep_no_connection(wire: Wire) -> None:
    with pytest.raises(ConnectionError):
        while True:
            wire.send(b"\r\n")
            time.sleep(0.05)


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["nothing", "half"])
def test_a_body_that_does_not_come_is_given_up(wire: Wire, share: float) -> None:
    body = chat()
    wire.send(request("POST", CHAT, {"Content-Length": str(len(body)), "Content-Type": "application/json"}))
    answer = wire.ask(body[: int(len(body) * share)])
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    assert wire.is_closed()


def test_a_body_that_drips_is_given_up(wire: Wire) -> None:
    body, since = chat(), time.monotonic()
    wire.send(request("POST", CHAT, {"Content-Length": str(len(body)), "Content-Type": "application/json"}))
    wire.socket.settimeout(0.2)
    for byte in body:
        try:
            assert wire.ask(bytes([byte])).status == 408
            break
        except TimeoutError:
            continue
    assert time.monotonic() - since < 5


@pytest.mark.parametrize(
    "head",
    [
        request(headers={"X-Padding": "x" * 70_000}),
        request(headers={f"X-{number}": "x" for number in range(300)}),
        request(headers={f"X-{number}": "x" * 1000 for number in range(80)}),
        request(path="/" + "x" * 70_000),
    ],
    ids=["value", "many", "sum", "path"],
)
def test_a_huge_head_is_refused(wire: Wire, head: bytes) -> None:
    answer = wire.ask(head)
    assert (answer.status, answer.error["code"], answer.headers["connection"]) == (431, "head_too_large", "close")
    assert wire.is_closed()


@pytest.mark.parametrize("begin", [b"GET /", b"GET /version HTTP/1.1\r\nX: ", b"GET /version HTTP/1.1\r\nX"])
def test_an_endless_head_is_cut_off(wire: Wire, begin: bytes) -> None:
    wire.send(begin)
    sent = 0
    with pytest.raises(ConnectionError):
        while True:
            sent += len(b"x" * 10_000)
            wire.send(b"x" * 10_000)
    assert sent < 20_000_000


def test_huge_trailers_are_refused(wire: Wire) -> None:
    wire.send(request("POST", CHAT, {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}))
    body = chat()
    wire.send(b"%x\r\n%s\r\n0\r\n" % (len(body), body))
    answer = wire.ask(*(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(80)))
    assert (answer.status, answer.error["code"]) == (431, "head_too_large")


def test_trailers_are_no_headers(wire: Wire) -> None:
    body = chat()
    wire.send(request("POST", CHAT, {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}))
    wire.send(b"%x\r\n%s\r\n" % (len(body), body))
    answer = wire.ask(b"0\r\nX-Request-Id: from-a-trailer\r\n\r\n")
    assert answer.status == 200
    assert answer.headers["x-request-id"] != "from-a-trailer"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /version HTTP/9.9\r\n\r\n",
        b"GET  /version HTTP/1.1\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"FROB /version HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_not_http_is_refused(wire: Wire, data: bytes) -> None:
    answer = wire.ask(data)
    assert 400 <= answer.status < 500
    assert answer.error["message"]
    assert wire.is_closed()


# Connections and methods


def test_a_connection_takes_many_requests(wire: Wire) -> None:
    for _ in range(3):
        assert wire.ask(post(chat())).status == 200
        assert wire.ask(request(path="/nothing")).status == 404


def test_of_requests_that_do_not_wait_the_first_is_answered(wire: Wire) -> None:
    answer = wire.ask(post(chat(max_tokens=30)), request(), request(path="/health"), b"nonsense\r\n\r\n")
    assert len(answer.json()["choices"][0]["message"]["content"]) > 2
    assert wire.is_closed()


def test_a_client_that_sends_a_second_request_and_goes_is_noticed(server: Running, wire: Wire) -> None:
    wire.send(post(chat(max_tokens=200, stream=True, ignore_eos=True)))
    wire.until(b"data:")
    wire.send(request())
    wire.kill()
    assert eventually(lambda: not server.server.state.num_under_way, 5)


def test_close_is_honoured(wire: Wire) -> None:
    assert wire.ask(request(headers={"Connection": "close"})).headers["connection"] == "close"
    assert wire.is_closed()


def test_http_1_0_gets_an_answer_and_the_end(wire: Wire) -> None:
    assert wire.ask(b"GET /version HTTP/1.0\r\nHost: localhost\r\n\r\n").status == 200
    assert wire.is_closed()


def test_a_client_that_waits_for_leave_gets_it(wire: Wire) -> None:
    body = chat()
    wire.send(post(body, Expect="100-continue")[: -len(body)])
    assert wire.answer().status == 100
    assert wire.ask(body).status == 200
    assert wire.ask(request()).status == 200


def test_a_client_that_waits_for_leave_and_gets_none_has_to_begin_anew(wire: Wire) -> None:
    """Its next request would be taken for the body else, and a proxy's next request is another user's."""
    head = request(
        "POST", CHAT, {"Content-Length": str(LIMIT + 1), "Content-Type": "application/json", "Expect": "100-continue"}
    )
    answer = wire.ask(head)
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert wire.is_closed()


def test_a_client_that_would_rather_use_http_2_goes_on_with_http_1(wire: Wire) -> None:
    """Java's client asks on each connection."""
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    for _ in range(2):
        assert wire.ask(request(headers=upgrade)).status == 200
        assert wire.ask(post(chat(), **upgrade)).status == 200
    websocket = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    assert wire.ask(request(headers=websocket)).status == 200
    assert wire.ask(request()).status == 200


@pytest.mark.parametrize("method", ["HEAD", "GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"])
def test_other_methods_are_refused(wire: Wire, method: str) -> None:
    answer = wire.send(request(method, CHAT)).answer(has_body=method != "HEAD")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    if method != "HEAD":
        assert answer.error["type"] == "invalid_request_error"


def test_head_tells_no_body(wire: Wire) -> None:
    answer = wire.send(request("HEAD")).answer(has_body=False)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert wire.ask(request()).json()["version"]


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/../../etc/passwd",
        "/page/../../settings.py",
        "/page/%2e%2e/%2e%2e/settings.py",
        "/page/js/..%2f..%2fsettings.py",
        "/page/js/%00",
        "//v1/models",
        "/v1/models/",
        "/v1//models",
        "/v1/models/..%2F..",
        "/v1/models/%00%0d%0aX-Injected:%201",
        "/v1/models/%ff%fe",
        "/tokenize/",
        "/V1/MODELS",
        "/v1/models/" + "x" * 5000,
        "/;jsessionid=1",
        "/%",
        "/%zz",
    ],
)
def test_there_is_nothing_at_other_paths(wire: Wire, path: str) -> None:
    answer = wire.ask(request(path=path))
    assert answer.status == 404
    assert len(answer.error["message"]) < 500
    assert "x-injected" not in answer.headers


def test_a_query_changes_nothing(wire: Wire) -> None:
    assert wire.ask(request(path="/version?x=1&y=%00#z")).status == 200
    assert wire.ask(request(path="http://localhost/version")).status == 200


def test_further_connections_are_refused(tools_bundle: Path) -> None:
    with serving(tools_bundle, max_connections=3, ready=True) as running:
        running.client.close()
        assert eventually(lambda: not running.server.server_state.connections)
        wires = [Wire(running.url) for _ in range(3)]
        try:
            assert [wire.ask(request()).status for wire in wires] == [200] * 3
            with Wire(running.url) as wire:
                answer = wire.answer()
                assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
                assert answer.headers["retry-after"] == "1"
                assert wire.is_closed()
            wires.pop().socket.close()
            assert eventually(lambda: len(running.server.server_state.connections) == 2)
            wires.append(Wire(running.url))
            assert wires[-1].ask(request()).status == 200
        finally:
            for wire in wires:
                wire.socket.close()


def test_every_error_says_which_request_it_is_of(server: Running) -> None:
    for path, status in (("/nothing", 404), ("/v1/models/x", 404), (CHAT, 405)):
        response = server.client.get(path, headers={"X-Request-Id": "mine:1"})
        assert (response.status_code, response.headers["x-request-id"]) == (status, "mine:1")


@pytest.mark.parametrize("name", ["a b", "x" * 129, "", "é", "a,b", "<script>", '"', "a\tb"])
def test_other_names_of_requests_are_replaced(wire: Wire, name: str) -> None:
    found = wire.ask(request(headers={"X-Request-Id": name})).headers["x-request-id"]
    assert found != name
    assert len(found) == 32


def test_one_request_does_not_hold_up_others(server: Running) -> None:
    """Bodies that are large, and structures that take long, are read a few at a time, so that others find a thread."""
    slow = {"messages": [{"role": "user", "content": "x"}], "guided_regex": "((a{1000}){1000}){1000}", "max_tokens": 1}
    wires = [Wire(server.url).send(post(json.dumps(slow).encode())) for _ in range(6)]
    try:
        for _ in range(3):
            assert server.chat().status_code == 200
    finally:
        for wire in wires:
            wire.kill()


def test_bodies_share_a_budget(tools_bundle: Path) -> None:
    """Clients that send large bodies slowly could fill the memory together."""
    with serving(tools_bundle, max_body_bytes=LIMIT, ready=False) as running:
        budget = running.server.state.bodies
        with budget.share() as take:
            take(63 * LIMIT)
            response = running.client.post(CHAT, content=b" " * LIMIT, headers={"Content-Type": "application/json"})
            assert response.status_code in (400, 503)
            take(LIMIT - 1)
            response = running.client.post(CHAT, content=chat(), headers={"Content-Type": "application/json"})
            assert (response.status_code, response.json()["error"]["code"]) == (503, "busy")
        response = running.client.post(CHAT, content=b"{", headers={"Content-Type": "application/json"})
        assert response.json()["error"]["code"] == "invalid_json"


def test_a_body_of_too_many_values_is_refused(tools_bundle: Path) -> None:
    with serving(tools_bundle) as running:
        junk = {"role": "user", "content": "x", "junk": [[]] * 120_000}
        response = running.post(CHAT, {"messages": [junk], "max_tokens": 1})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "too_much")
        assert running.post("/detokenize", {"tokens": [5] * 120_000}).status_code == 200
        for _ in range(4):  # each is heavy, and its turn ends
            assert running.post(CHAT, {"messages": [{"role": "user", "content": "x" * 300_000}]}).status_code == 400
        assert running.post(CHAT, {"messages": [{"role": "user", "content": "x"}], "guided_regex": "a"}).status_code == 200
