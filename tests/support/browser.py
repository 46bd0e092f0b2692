"""A real browser for tests: Chromium without a window, through Playwright. Debian's package `chromium` is enough."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 20_000  # milliseconds that a page has for anything
COUNT_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
    window.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. The test is skipped if there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched_page(browser: Any, url: str, **context: Any) -> Iterator[Any]:
    """A page of its own context. At the end nothing may have failed in it, and nothing may have left the server at `url`."""
    problems: list[str] = []
    with browser.new_context(**context) as opened:
        opened.set_default_timeout(PATIENCE)
        opened.add_init_script(COUNT_VIOLATIONS)
        opened.on("request", lambda request: request.url.startswith(url) or problems.append(f"asked for {request.url}"))
        page = opened.new_page()
        page.on("pageerror", lambda error: problems.append(f"raised {error}"))
        page.on("console", lambda message: _is_harmless(message) or problems.append(f"told {message.text}"))
        page.on("dialog", lambda dialog: (problems.append(f"alerted {dialog.message}"), dialog.dismiss()))
        page.goto(url)
        yield page
        assert page.evaluate("window.violations") == []
    assert problems == []


def ask(page: Any, question: str = "How do I make tea?") -> None:
    """Send a question on the page at `/`."""
    page.fill("#question", question)
    page.press("#question", "Enter")


def finished(page: Any) -> None:
    """Wait until nothing runs."""
    page.locator("#send").wait_for()


def tokens(page: Any) -> Any:
    """The tokens of all answers."""
    return page.get_by_role("option")


def _is_harmless(message: Any) -> bool:
    """Chromium itself tells every answer of 400 and more, and every connection that breaks."""
    return message.type not in ("error", "warning") or message.text.startswith("Failed to load resource")
