"""The page at `/` with the real server, on a tiny random bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.support.browser import ask, finished, tokens, watched_page
from tests.support.server import Running, serving


def limit_tokens(page: Any, count: int) -> None:
    page.click("#open-settings")
    page.fill("#max-tokens", str(count))
    page.get_by_role("button", name="Save").click()


def without_space(text: str) -> str:
    """The view shows white space by marks."""
    return re.sub(r"[\s␣↵⇥∅]", "", text)


def test_a_chat_with_the_real_server_and_the_same_without_medusa(server: Running, browser: Any) -> None:
    with watched_page(browser, server.url) as page:
        page.get_by_text("tiny · ").wait_for()
        limit_tokens(page, 24)
        page.check("#compare")
        ask(page, "the quick brown fox")
        finished(page)
        assert page.locator(".note.error").count() == 0
        assert "Both texts are the same, token for token (24 tokens)." in page.locator(".verdict").inner_text()
        assert page.locator("[data-value=tokens]").all_inner_texts() == ["24", "24"]
        drafted = page.locator(".answer.on .step")
        shown = 0
        for step in range(1, drafted.count()):
            drafted.nth(step).get_by_role("option").first.click()
            given_out = [text.strip() for text in drafted.nth(step).get_by_role("option").all_text_contents()]
            kept = page.locator("#panel-step .node.accepted, #panel-step .node.bonus").count()
            assert kept == len(given_out)
            shown += page.locator("#panel-step .node").count() > 2
        assert shown > 0  # some step had guesses


def test_the_texts_of_the_tokens_are_the_text(server: Running, browser: Any) -> None:
    with watched_page(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        limit_tokens(page, 16)
        ask(page, "a small model")
        finished(page)
        by_token = "".join(tokens(page).all_text_contents())
        page.get_by_role("button", name="Copy").click()
        page.get_by_role("button", name="Copied").wait_for()
        text = page.evaluate("navigator.clipboard.readText()")
        assert len(text) > 0
        assert without_space(by_token) == without_space(text)


def test_a_server_with_keys(tools_bundle: Path, browser: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("open-sesame-open-sesame\n", encoding="utf-8")
    keys.chmod(0o600)
    with serving(tools_bundle, api_key_file=keys) as server, watched_page(browser, server.url) as page:
        page.get_by_role("dialog").wait_for()
        page.fill("#key-field", "open-sesame-open-sesame")
        page.keyboard.press("Enter")
        limit_tokens(page, 4)
        ask(page)
        finished(page)
        assert page.locator("[data-value=tokens]").inner_text() == "4"


def test_a_real_refusal_is_readable(server: Running, browser: Any) -> None:
    with watched_page(browser, server.url) as page:
        ask(page, "word " * 3000)
        finished(page)
        line = page.locator(".note.error").inner_text()
        assert line.startswith("The server refused the request. ")
        assert "\n" not in line
