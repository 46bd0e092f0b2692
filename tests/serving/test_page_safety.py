"""What the page at `/` does with hostile text and with failures: of the server, of the key, of the connection."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest

from tests.support.browser import ask, finished, tokens
from tests.support.scripted_server import MODEL, Script, ScriptedServer, Step, node, plain, token

ATTACKS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "![picture](https://example.org/spy.png)",
    "![x](javascript:alert(3))",
    "[click](javascript:alert(4))",
    "[click](JaVaScRiPt&#58;alert(5))",
    "[click](data:text/html;base64,PHNjcmlwdD5hbGVydCg2KTwvc2NyaXB0Pg==)",
    "[click](v1/models)",
    "<a href='javascript:alert(7)' onclick='alert(8)'>click</a>",
    "<svg onload=alert(9)><script>alert(10)</script></svg>",
    "<iframe src='https://example.org/'></iframe>",
    "<style>body { display: none }</style>",
    "<form action='https://example.org/'><input name=q></form>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(11)>",
    '`<img src=x onerror="alert(12)">`',
    "```html\n<script>alert(13)</script>\n```",
    "<details open ontoggle=alert(14)><summary>x</summary></details>",
    '[x](https://example.org/ "onmouseover=alert(15)")',
    "<p style='background: url(https://example.org/spy)'>x</p>",
    "<meta http-equiv=refresh content='0; url=https://example.org/'>",
    "<base href='https://example.org/'>",
)
BREAK_OUT = """async () => {
    const stopped = [];
    document.addEventListener("securitypolicyviolation", (event) => stopped.push(event.effectiveDirective));
    try { document.body.innerHTML = "<b>x</b>"; } catch { stopped.push("innerHTML"); }
    const script = document.createElement("script");
    try { script.text = "window.hacked = 1"; document.head.append(script); } catch { stopped.push("script.text"); }
    await fetch("http://127.0.0.2:9/").catch(() => {});
    const image = new Image();
    const failed = new Promise((resolve) => image.addEventListener("error", resolve));
    image.src = "data:image/gif;base64,R0lGODlhAQABAAAAACw=";
    await failed;
    return [stopped, window.hacked ?? null];
}"""
ALLOWED = {"A", "BLOCKQUOTE", "BR", "CODE", "DEL", "EM", "H1", "HR", "LI", "OL", "P", "PRE", "STRONG", "UL", "DIV"}


@pytest.mark.parametrize("view", ["Text", "Tokens"])
def test_hostile_text_of_a_model_does_nothing(opened: Any, view: str) -> None:
    """The page that this test opens also fails if anything raises, alerts, breaks the policy or asks another server."""
    page, _ = opened(Script(plain(*(f"{attack}\n\n" for attack in ATTACKS))))
    page.get_by_text(view, exact=True).click()
    ask(page, "<img src=x onerror=alert(0)>")
    finished(page)
    text = page.locator(".text")
    assert set(text.locator("*").evaluate_all("parts => parts.map(part => part.tagName)")) <= ALLOWED | {"SPAN"}
    names = set(text.locator("*").evaluate_all("parts => parts.flatMap(part => part.getAttributeNames())"))
    assert names <= {"class", "href", "rel", "target"} or view == "Tokens"
    assert not {name for name in names if name.startswith("on") or name in ("style", "src", "srcdoc", "action")}
    assert set(text.locator("a").evaluate_all("links => links.map(link => link.getAttribute('href'))")) <= {
        None,
        "https://example.org/",
    }
    for link in text.locator("a").all():
        link.click(trial=True)
    if view == "Text":
        assert "<script>alert(1)</script>" in text.inner_text()  # shown as it was written
        assert "[image: picture]" in text.inner_text()
        assert text.locator("a[href]").count() == 1
    assert page.locator(".question").inner_text() == "<img src=x onerror=alert(0)>"


def test_hostile_drafts_and_names_do_nothing(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "<img src=x onerror=alert(1)>"
    monkeypatch.setitem(MODEL, "id", evil)
    nodes = [node(evil, -1, 0, 1.0, "model"), node(evil, 0, 1, 0.5, evil), node("x" * 5000, 0, 1, 0.4)]
    page, _ = opened(Script([*plain(evil), Step([token(evil, evil, 1), token(evil)], nodes, [0, 1])]))
    page.locator("#model:not(:empty)").wait_for()
    assert page.locator("#model").inner_text().startswith(evil)
    ask(page)
    finished(page)
    tokens(page).nth(1).click()
    assert page.locator("#panel-step .node").count() == 4
    assert page.locator("#panel-step img, .tokens img, .top nav img").count() == 0


def test_the_policy_stops_what_the_page_itself_would_not(browser: Any) -> None:
    """The policy is in force in the browser, not only in a header."""
    with ScriptedServer().serving() as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        stopped, hacked = page.evaluate(BREAK_OUT)
    assert {"innerHTML", "script.text", "connect-src", "img-src"} <= set(stopped)
    assert hacked is None


def test_the_key_is_asked_for_after_a_401_and_kept_in_the_tab(opened: Any) -> None:
    page, _ = opened(Script(plain("Hi")), Script(plain("again")), api_key="secret")
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    assert page.locator("#key-refused").is_hidden()
    page.fill("#key-field", "wrong")
    page.keyboard.press("Enter")
    page.locator("#key-refused").wait_for()
    page.fill("#key-field", "secret")
    page.keyboard.press("Enter")
    page.get_by_text("scripted · 4 heads").wait_for()
    assert dialog.count() == 0
    ask(page)
    finished(page)
    assert page.locator(".tokens").inner_text() == "Hi"
    assert page.evaluate(
        "Object.values(sessionStorage).includes('secret') && localStorage.length === 0 && document.cookie === ''"
    )
    page.reload()
    page.get_by_text("scripted · 4 heads").wait_for()
    assert dialog.count() == 0
    page.click("#open-settings")
    page.get_by_role("button", name="Forget the API key").click()
    page.get_by_role("button", name="Cancel").click()
    ask(page)
    dialog.wait_for()  # asked again, and the question is sent once the key is there
    page.fill("#key-field", "secret")
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".tokens").inner_text() == "again"


def test_without_a_key_the_error_is_told(opened: Any) -> None:
    page, _ = opened(api_key="secret")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.locator("#model").get_by_text("The server asks for an API key. No API key, or a wrong one.").wait_for()


def test_no_key_is_asked_for_without_a_401(opened: Any) -> None:
    page, _ = opened(Script(plain("Hi")))
    ask(page)
    finished(page)
    assert page.locator("dialog[open]").count() == 0


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (
            Script(status=429, message="the queue is full: 3 of 3 answers under way", headers={"Retry-After": "7"}),
            "The server is busy. The queue is full: 3 of 3 answers under way. Try again in 7 s.",
        ),
        (
            Script(status=503, message="the model is being loaded", headers={"Retry-After": "2"}),
            "The server is not ready. The model is being loaded. Try again in 2 s.",
        ),
        (
            Script(status=400, message="the prompt has\n9000 tokens"),
            "The server refused the request. The prompt has 9000 tokens.",
        ),
        (Script(status=500, message=""), "The server failed."),
        (Script(status=418, message="a teapot!"), "The server answered with status 418. A teapot!"),
    ],
)
def test_a_refusal_is_one_readable_line_and_can_be_tried_again(opened: Any, script: Script, line: str) -> None:
    page, server = opened(script, Script(plain("Now it works")))
    ask(page)
    finished(page)
    assert page.locator(".note.error").inner_text() == line
    assert page.locator("#announcer").inner_text() == line
    page.get_by_role("button", name="Try again").click()
    page.locator(".tokens").get_by_text("Now").wait_for()
    finished(page)
    assert page.locator(".note.error").count() == 0
    assert page.locator(".answer").count() == 1
    assert server.bodies[0] == server.bodies[1]


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (
            Script(plain("Half", " an"), stream_error="the decode thread died"),
            "The server ended the answer with an error. The decode thread died.",
        ),
        (
            Script(plain("Half an"), ending="cut", held=threading.Event()),
            "The connection was lost before the answer was complete. Is the server still running?",
        ),
        (
            Script(plain("Half", " an"), ending="silent"),
            "The connection was lost before the answer was complete. Is the server still running?",
        ),
    ],
)
def test_what_came_before_a_failure_stays(opened: Any, script: Script, line: str) -> None:
    page, _ = opened(script)
    ask(page)
    if script.held is not None:
        tokens(page).first.wait_for()  # a browser forgets what it has not yet given to the page when the connection breaks
        script.held.set()
    finished(page)
    assert page.locator(".note.error").inner_text() == line
    assert page.locator(".tokens").inner_text() == "Half an"
    assert page.get_by_role("button", name="Try again").is_visible()


def test_no_server_at_all(opened: Any) -> None:
    page, _ = opened(Script(plain("Hi")))
    page.locator("#model:not(:empty)").wait_for()
    page.context.set_offline(True)
    ask(page)
    finished(page)
    assert page.locator(".note.error").inner_text().startswith("The connection was lost")


def test_a_comparison_with_a_failure_claims_nothing(opened: Any) -> None:
    page, _ = opened(Script(plain("a", "b")), Script(status=429, message="busy"))
    page.check("#compare")
    ask(page)
    finished(page)
    assert page.locator(".verdict .headline").inner_text() == "No comparison: one of the two answers did not run to its end."
    assert page.locator(".note.error").inner_text() == "The server is busy. Busy."


def test_it_works_under_a_path(opened: Any) -> None:
    page, server = opened(Script(plain("Hi")), root_path="/some/where")
    assert server.url.endswith("/some/where/")
    ask(page)
    finished(page)
    assert page.locator(".tokens").inner_text() == "Hi"


def test_events_are_read_however_they_are_cut(opened: Any) -> None:
    page, _ = opened()
    text = ': hello\r\n\r\ndata: {"a": "ä€😀"}\n\nevent: x\rdata:one\rdata: two\r\r\n\ndata: last\r\n\r\ndata: never ended'
    told = page.evaluate(
        """async (text) => {
            const { readEvents } = await import("./page/js/stream.js");
            const bytes = new TextEncoder().encode(text);
            const all = [];
            for (const size of [1, 2, 3, 5, 1000]) {
                const body = new ReadableStream({
                    start(controller) {
                        for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                        controller.close();
                    },
                });
                const events = [];
                for await (const data of readEvents(body)) events.push(data);
                all.push(events);
            }
            return all;
        }""",
        text,
    )
    assert told == [['{"a": "ä€😀"}', "one\ntwo", "last"]] * 5


def test_nothing_of_the_page_names_another_server(opened: Any) -> None:
    page, server = opened()
    loaded = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(loaded) > 20
    assert {re.match(r"https?://[^/]+/", name)[0] for name in loaded} == {server.url}
