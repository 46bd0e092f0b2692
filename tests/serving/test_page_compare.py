"""The page at `/` in a real browser: the same prompt with Medusa off."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.support.browser import ask, finished, tokens
from tests.support.scripted_server import STEPS, Script, plain


def test_medusa_off_is_beside_it(opened: Any) -> None:
    texts = ["To", " make", " a", " cup", " of", " tea", "."]
    page, server = opened(Script(STEPS), Script(plain(*texts)))
    page.check("#compare")
    ask(page)
    finished(page)
    assert [body["medusa"]["enabled"] for body in server.bodies] == [True, False]
    assert server.bodies[0]["messages"] == server.bodies[1]["messages"]
    columns = page.locator(".answer")
    boxes = [column.bounding_box() for column in columns.all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert columns.nth(1).locator("[data-value=length]").inner_text() == "1.00"
    verdict = page.locator(".verdict").inner_text()
    assert "Both texts are the same, token for token (7 tokens)." in verdict
    assert "Both answers ran on one machine, one after the other." in verdict
    columns.nth(1).get_by_role("option").nth(3).click()
    assert (
        page.locator(".sentence").inner_text()
        == "Medusa is off, so nothing was guessed. One pass of the whole model gave out one token: “cup”."
    )


def test_both_at_once_if_the_settings_say_so(opened: Any) -> None:
    held = threading.Event()
    page, server = opened(Script(plain("a", "b"), held=held), Script(plain("a", "c"), held=held))
    page.click("#open-settings")
    page.check("#together")
    page.fill("#system", "Be short.")
    page.fill("#temperature", "0.7")
    page.fill("#max-tokens", "12")
    page.get_by_role("button", name="Save").click()
    page.check("#compare")
    ask(page)
    tokens(page).nth(1).wait_for()  # the first token of the second answer, while the first answer is held back
    held.set()
    finished(page)
    assert "Both answers ran at once" in page.locator(".verdict").inner_text()
    assert "at temperature 0.7, each answer draws its own random numbers" in page.locator(".verdict").inner_text()
    for body in server.bodies:
        assert (body["temperature"], body["max_tokens"]) == (0.7, 12)
        assert body["messages"][0] == {"role": "system", "content": "Be short."}


def test_an_answer_can_be_compared_later(opened: Any) -> None:
    page, server = opened(Script(STEPS), Script(plain("To", " err")))
    ask(page)
    finished(page)
    page.get_by_role("button", name="Run this with Medusa off").click()
    page.locator(".verdict").wait_for()
    assert "The texts differ from token 2 on." in page.locator(".verdict").inner_text()
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("on", "off", "headline"),
    [
        ((1.0, 2.0, 21), (1.0, 4.0, 21), "3.00 times as fast: 2.0 s with Medusa, 4.0 s without."),
        ((1.0, 3.0, 21), (1.0, 2.0, 21), "Slower: 0.50 times the speed. 3.0 s with Medusa, 2.0 s without."),
        ((1.0, 3.0, 21), (0.5, 2.5, 21), "As fast as without Medusa: 3.0 s with Medusa, 2.5 s without."),
        ((1.0, 2.0, 41), (1.0, 2.0, 21), "2.00 times as fast: 2.0 s with Medusa, 2.0 s without."),
    ],
)
def test_the_speed_up_is_that_of_decoding(opened: Any, on: Any, off: Any, headline: str) -> None:
    page, _ = opened()
    told = page.evaluate(
        """async (runs) => {
            const { Answer } = await import("./page/js/answer.js");
            const { compare } = await import("./page/js/verdict.js");
            const answers = runs.map(([first, end, numTokens], at) => {
                const answer = new Answer(at === 0);
                const some = (size) => Array.from({ length: size }, (_, id) => ({ id }));
                const chunk = (size) => ({ choices: [], medusa: { tokens: some(size), draft: null } });
                answer.start(0);
                answer.take(chunk(1), first * 1000);
                answer.take(chunk(numTokens - 1), end * 1000);
                answer.end("done", end * 1000);
                return answer;
            });
            return compare(...answers, { together: false, temperature: 0 });
        }""",
        [on, off],
    )
    assert told["headline"] == headline
