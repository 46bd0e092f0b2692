"""The page at `/` in a real browser, by keyboard alone."""

from __future__ import annotations

from typing import Any

from tests.support.browser import ask, finished, tokens
from tests.support.scripted_server import STEPS, Script


def test_the_whole_page_works_by_keyboard(opened: Any) -> None:
    page, _ = opened(Script(STEPS))
    focused = "() => document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
    page.keyboard.type("How do I make tea?")  # the question has the focus from the start
    page.keyboard.press("Enter")
    finished(page)
    for _ in range(10):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.role") == "option":
            break
    assert page.evaluate(focused) == "“To”, chosen by the model itself"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#panel-title").inner_text().startswith("Step 2")
    page.keyboard.press("ArrowDown")  # the panel follows
    assert page.locator("#panel-title").inner_text().startswith("Step 3")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    assert page.locator("#panel-title").inner_text().startswith("Step 4")
    page.keyboard.press("ArrowRight")  # nothing comes after it
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == "“tea”, copied from earlier text by prompt lookup"
    page.locator("#panel-close").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused).startswith("“tea”, copied")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "treeitem"
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden()
    assert page.evaluate("document.activeElement.role") == "option"
    assert page.evaluate(focused) == "“tea”, copied from earlier text by prompt lookup"


def test_tab_reaches_everything_and_the_focus_is_seen(opened: Any) -> None:
    page, _ = opened(Script(STEPS))
    ask(page)
    finished(page)
    tokens(page).nth(1).click()
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, is_seen = page.evaluate(
            """() => {
                const at = document.activeElement;
                if (at === document.body) return ["body", true];
                const parts = [at, at.nextElementSibling, at.querySelector(".pill")].filter(Boolean);
                const styles = parts.map((part) => getComputedStyle(part));
                const isSeen = styles.some((style) => style.outlineStyle === "solid" || style.strokeWidth === "3px");
                return [at.id || at.getAttribute("role") || at.textContent, isSeen];
            }"""
        )
        if name in reached:
            break
        assert is_seen, name
        reached.append(name)
    assert {
        "explain",
        "open-settings",
        "clear",
        "option",
        "Copy",
        "question",
        "compare",
        "send",
        "panel-close",
        "treeitem",
    } <= set(reached)
    assert any(name.startswith("Next step") for name in reached)
