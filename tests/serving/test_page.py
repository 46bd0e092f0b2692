"""The page at `/` in a real browser: chats, tokens, trees, comparisons, by mouse and by keyboard."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.support.browser import ask, finished, tokens
from tests.support.scripted_server import STEPS, TEXT, Script, plain


def node_named(page: Any, text: str) -> Any:
    return page.locator("#panel-step").get_by_role("treeitem", name=f"“{text}”")


def test_a_chat_streams_and_renders_markdown(opened: Any) -> None:
    held = threading.Event()
    page, server = opened(
        Script(plain("# Tea", "\n\n1. **boil** water\n2. ", "`wait`\n\n", "[more](https://example.org/tea)"), held=held)
    )
    page.get_by_text("Text", exact=True).click()
    ask(page)
    page.locator(".prose h1").wait_for()  # the first part is there while the rest is held back
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    held.set()
    finished(page)
    prose = page.locator(".prose")
    assert prose.locator("li").all_inner_texts() == ["boil water", "wait"]
    assert prose.locator("li strong").inner_text() == "boil"
    link = prose.locator("a")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert (link.get_attribute("href"), link.get_attribute("target")) == ("https://example.org/tea", "_blank")
    assert page.locator(".answer").get_attribute("aria-busy") == "false"
    assert page.locator("#announcer").inner_text().startswith("The answer is complete. 4 tokens, 1.0 tokens a step.")
    assert server.bodies[0] == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "How do I make tea?"}],
        "temperature": 0,
        "max_tokens": 256,
        "medusa": {"enabled": True, "drafts": True},
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_next_question_comes_with_what_was_said(opened: Any) -> None:
    page, server = opened(Script(STEPS), Script(plain("Yes")))
    ask(page)
    finished(page)
    ask(page, "Sure?")
    finished(page)
    said = [(message["role"], message["content"]) for message in server.bodies[1]["messages"]]
    assert said == [("user", "How do I make tea?"), ("assistant", TEXT), ("user", "Sure?")]


def test_each_token_shows_its_source_by_more_than_colour(opened: Any) -> None:
    page, _ = opened(Script(STEPS))
    ask(page)
    finished(page)
    looks = tokens(page).evaluate_all(
        """tokens => tokens.map(token => [token.textContent, token.dataset.mark, getComputedStyle(token).borderBottomStyle,
                                          getComputedStyle(token).backgroundColor])"""
    )
    assert [(text, mark, line) for text, mark, line, _ in looks] == [
        ("To", "", "solid"),
        ("make", "1", "solid"),
        ("a", "2+", "dashed"),
        ("cup", "", "solid"),
        ("of", "", "solid"),
        ("tea", "↩", "double"),
        (".", "", "solid"),
    ]
    tints = {text: tint for text, _, _, tint in looks}
    assert tints["To"] == tints["cup"] == tints["."] == "rgba(0, 0, 0, 0)"
    assert len({tints[text] for text in ("To", "make", "a", "tea")}) == 4
    assert page.locator(".tokens").inner_text() == TEXT
    names = [token.get_attribute("aria-label") for token in tokens(page).all()]
    assert names[1:3] == ["“make”, guessed by head 1", "“a”, guessed by head 2 with the help of n-grams"]
    steps = page.locator(".step").evaluate_all("steps => steps.map(step => step.getAttribute('aria-label'))")
    assert steps == ["Step 1, 1 token", "Step 2, 3 tokens", "Step 3, 1 token", "Step 4, 2 tokens"]
    assert page.locator("#legend li").all_inner_texts()[0].endswith("model itself")


def test_line_breaks_and_indentation_stay_in_the_tokens(opened: Any) -> None:
    page, _ = opened(Script(plain("def", " f", "():\n", "   ", " return", "\n\n", "# end", "")))
    ask(page)
    finished(page)
    shown = page.locator(".tokens").evaluate("view => view.innerText")
    assert shown.split("\n") == ["def f():↵", "␣␣␣ return↵↵", "", "# end∅"]


def test_a_click_shows_the_tree_of_the_step(opened: Any) -> None:
    page, _ = opened(Script(STEPS))
    ask(page)
    finished(page)
    tokens(page).nth(2).click()
    assert page.locator("#panel-title").inner_text() == "Step 2: 3 tokens from one pass"
    assert page.locator(".sentence").inner_text() == (
        "Head 1 guessed “make” and head 2 “a”. The model agreed with 2 of the 5 guesses and added “cup” itself, "
        "so this pass gave out 3 tokens instead of one."
    )
    rows = page.locator("#panel-step .node").evaluate_all(
        "nodes => nodes.map(node => [node.classList[1], node.querySelector('.word').textContent, node.querySelector('.percent')?.textContent ?? ''])"
    )
    assert rows == [  # children below their parent, the likelier first
        ["root", "To", ""],
        ["accepted", "make", "51 %"],
        ["rejected", "the", "22 %"],
        ["accepted", "a", "21 %"],
        ["bonus", "cup", ""],
        ["rejected", "start", "10 %"],
        ["rejected", "prepare", "9 %"],
    ]
    assert page.locator("#panel-step .node.rejected .strike").count() == 3
    assert page.locator("#panel-step .link.accepted").count() == 2
    masks = page.locator("#panel-step .mask-row").evaluate_all(
        "rows => rows.map(row => [...row.querySelectorAll('.cell')].slice(1).map(cell => cell.classList.contains('sees') ? 1 : 0).join(''))"
    )
    assert masks == ["100000", "110000", "111000", "110100", "100010", "100001"]
    assert page.locator("[aria-selected=true]").inner_text() == "a"


def test_a_node_tells_what_it_sees(opened: Any) -> None:
    page, _ = opened(Script(STEPS))
    ask(page)
    finished(page)
    tokens(page).nth(1).click()
    node_named(page, "the").hover()
    caption = page.locator("#panel-step figcaption")
    assert caption.inner_text() == (
        "“the”, guessed by head 2, rejected, probability 22 %. It sees the text so far, “To”, “make” and itself, but none of its rivals."
    )
    seen = page.locator("#panel-step .tree .seen .word").all_text_contents()
    assert seen == ["To", "make", "the"]
    page.locator("#panel-title").hover()
    assert caption.inner_text().startswith("Point at a token")


def test_other_steps_are_explained_too(opened: Any) -> None:
    page, _ = opened(Script(STEPS))
    ask(page)
    finished(page)
    told = []
    tokens(page).first.click()
    told.append(page.locator(".sentence").inner_text())
    for _ in range(3):
        page.get_by_role("button", name="Next step").click()
        told.append(page.locator(".sentence").inner_text())
    assert (
        told[0] == "This is the first pass: the model reads the prompt and chooses “To” itself. Nothing has been guessed yet."
    )
    assert told[2] == (
        "There was one guess, and the model did not agree with it. Its own token “of” took their place: one token from one pass, "
        "as without Medusa. The text is not harmed."
    )
    assert told[3] == (
        "Prompt lookup copied “tea”. It was the only guess; the model agreed with it and added “.” itself, "
        "so this pass gave out 2 tokens instead of one."
    )
    assert page.get_by_role("button", name="Next step").is_disabled()


def test_measures_are_shown(opened: Any) -> None:
    page, _ = opened(Script(STEPS, pause=0.01))
    ask(page)
    finished(page)
    assert page.locator("[data-value=tokens]").inner_text() == "7"
    assert page.locator("[data-value=length]").inner_text() == "2.00"  # 6 tokens from the 3 steps after the first
    assert float(page.locator("[data-value=speed]").inner_text()) > 0
    assert page.locator(".strip g").count() == 4


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
            const [{ Answer }, { compare }] = await Promise.all([import("./page/js/answer.js"), import("./page/js/verdict.js")]);
            const answers = runs.map(([first, end, numTokens], at) => {
                const answer = new Answer(at === 0);
                const chunk = (size) => ({ choices: [], medusa: { tokens: Array.from({ length: size }, (_, id) => ({ id })), draft: null } });
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


def test_stop_frees_the_server_and_keeps_the_text(opened: Any) -> None:
    page, server = opened(Script(plain("Once", " upon"), held=threading.Event()))
    ask(page)
    tokens(page).first.wait_for()
    page.get_by_role("button", name="Stop").click()
    finished(page)
    assert server.left.wait(20)
    assert page.locator(".note").inner_text() == "Stopped."
    assert page.locator(".tokens").inner_text() == "Once"


def test_clear_and_copy(opened: Any) -> None:
    page, server = opened(Script(STEPS), Script(plain("Hi")), permissions=["clipboard-read", "clipboard-write"])
    ask(page)
    finished(page)
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == TEXT
    tokens(page).first.click()
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".turn").count() == 0
    assert page.locator("#panel").is_hidden()
    assert page.locator("#welcome").is_visible()
    ask(page, "Hello")
    finished(page)
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["Hello"]


def test_clear_ends_what_runs(opened: Any) -> None:
    page, server = opened(Script(plain("a", "b"), held=threading.Event()), Script(plain("c")))
    page.check("#compare")
    ask(page)
    tokens(page).first.wait_for()
    page.get_by_role("button", name="Clear").click()
    finished(page)
    assert server.left.wait(20)
    assert (page.locator(".turn").count(), len(server.bodies)) == (0, 1)


def test_an_answer_that_was_cut_says_so(opened: Any) -> None:
    page, _ = opened(Script(plain("a", "b"), finish_reason="length"))
    ask(page)
    finished(page)
    assert page.locator(".note").inner_text() == "Cut after 2 tokens, as the settings say."


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
                const shown = [at, at.nextElementSibling, at.querySelector?.(".pill")].filter(Boolean).map((part) => getComputedStyle(part));
                if (at === document.body) return ["body", true];
                return [at.id || at.getAttribute("role") || at.textContent, shown.some((style) => style.outlineStyle === "solid" || style.strokeWidth === "3px")];
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


def test_the_explanation_is_there(opened: Any) -> None:
    page, _ = opened()
    assert page.locator("#explanation").is_visible()  # on a wide screen, from the start
    assert page.locator("#example .node.rejected").count() == 4
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden()
    page.get_by_role("button", name="What am I looking at?").click()
    assert page.locator("#explanation").is_visible()
    words = page.locator("#explanation").inner_text().split()
    assert len(words) < 520  # two minutes' reading
