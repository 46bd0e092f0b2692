"""How the page at `/` looks: light and dark, narrow, without motion, and readable."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest

from tests.support.browser import ask, finished, tokens
from tests.support.scripted_server import STEPS, Script, Step, node, plain, token

KINDS = [
    ("model", 0),
    *((source, depth) for source in ("head", "ngrams") for depth in range(1, 8)),
    ("lookup", 1),
    ("guide", 1),
]


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of "rgb(1, 2, 3)"."""
    channels = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_colour_scheme_and_stays_readable(opened: Any, scheme: str) -> None:
    all_kinds = Step([token(f"{source}{depth}", source, depth) for source, depth in KINDS])
    page, _ = opened(Script([all_kinds]), color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    ask(page)
    finished(page)
    sunk = page.locator(".step").evaluate("step => getComputedStyle(step).backgroundColor")
    looks = tokens(page).evaluate_all(
        """tokens => tokens.map(token => [getComputedStyle(token).color, getComputedStyle(token).backgroundColor,
                                          getComputedStyle(token, '::after').color])"""
    )
    assert len(looks) == len(KINDS)
    for ink, tint, mark in looks:
        assert contrast(ink, sunk if tint == "rgba(0, 0, 0, 0)" else tint) >= 4.5
        assert contrast(mark, paper) >= 3  # WCAG's limit for what is not text; the mark is also in the token's name
    heads = [luminance(tint) for (source, _), (_, tint, _) in zip(KINDS, looks, strict=True) if source == "head"][:6]
    assert heads == sorted(heads, reverse=scheme == "light")  # the scale is one of brightness, not of hue alone
    soft = page.evaluate(
        "[...document.querySelectorAll('.legend, .top .model, .meter dt')].map(part => getComputedStyle(part).color)"
    )
    assert min(contrast(colour, paper) for colour in soft) >= 4.5


@pytest.mark.parametrize("width", [320, 390, 768, 1024, 1280])
def test_nothing_scrolls_sideways(opened: Any, width: int) -> None:
    wide = Step(
        [token("supercalifragilistic" * 6, "head", 1), token(".")],
        [
            node("a", -1, 0, 1.0, "model"),
            node("supercalifragilistic" * 6, 0, 1, 0.5),
            *(node(f"w{at}", at, at, 0.1) for at in range(1, 6)),
        ],
        [0, 1],
    )
    code = plain("\n\n```\n" + "x" * 300 + "\n```\n\n| a | b |\n|--|--|\n| " + "y" * 200 + " | z |\n")
    page, _ = opened(Script([*STEPS, wide, *code]), Script(STEPS), viewport={"width": width, "height": 740})

    def is_within() -> bool:
        return page.evaluate(
            "[document.scrollingElement, document.body, ...document.querySelectorAll('main, .panel, .turn, .answer')]"
            ".every(part => part.offsetParent === null && part !== document.body || part.scrollWidth <= part.clientWidth + 1)"
        )

    assert is_within()
    page.click("#explain")
    assert is_within()
    page.keyboard.press("Escape")
    page.check("#compare")
    ask(page)
    finished(page)
    assert is_within()
    page.get_by_text("Text", exact=True).click()
    assert is_within()
    page.get_by_text("Tokens", exact=True).click()
    tokens(page).nth(7).click()
    assert page.locator("#panel-step .tree").is_visible()
    assert is_within()


def test_a_chosen_token_stays_in_sight_of_a_phone(opened: Any) -> None:
    page, _ = opened(
        Script([*plain(*(f" word{number}" for number in range(150))), *STEPS]), viewport={"width": 390, "height": 740}
    )
    ask(page)
    finished(page)
    tokens(page).last.click()
    chosen, panel = page.locator("[aria-selected=true]").bounding_box(), page.locator("#panel").bounding_box()
    assert 0 < chosen["y"] < chosen["y"] + chosen["height"] <= panel["y"]


@pytest.mark.parametrize(("motion", "name"), [("reduce", "none"), ("no-preference", "blink")])
def test_motion_is_left_out_if_it_is_not_wanted(opened: Any, motion: str, name: str) -> None:
    held = threading.Event()
    page, _ = opened(Script(plain("a", "b"), held=held), reduced_motion=motion)
    page.get_by_text("Text", exact=True).click()
    ask(page)
    page.locator(".prose p").wait_for()
    assert page.evaluate("getComputedStyle(document.querySelector('.prose p'), '::after').animationName") == name
    held.set()
    finished(page)


def scrolled(page: Any) -> dict[str, float]:
    """Where the chat is scrolled to, once the next two frames are drawn, and how much is below it."""
    return page.evaluate(
        """async () => {
            for (let frame = 0; frame < 2; frame += 1) await new Promise(requestAnimationFrame);
            const main = document.querySelector("main");
            return { top: main.scrollTop, left: main.scrollHeight - main.scrollTop - main.clientHeight };
        }"""
    )


def test_a_growing_answer_stays_in_sight_unless_the_reader_scrolls_away(opened: Any) -> None:
    held = threading.Event()
    lines = plain(*(f"line {number}\n" for number in range(60)))
    first = Step([part for step in lines for part in step.tokens])
    page, _ = opened(Script([first, *lines], held=held))
    ask(page)
    tokens(page).nth(59).wait_for()
    assert scrolled(page)["left"] < 5
    page.evaluate("document.querySelector('main').scrollTop = 0")
    page.evaluate("new Promise(requestAnimationFrame)")  # the page hears of it before the next frame
    held.set()
    finished(page)
    assert tokens(page).count() == 120
    assert scrolled(page)["top"] == 0
