"""The page at `/` in a real browser: chats, tokens, and the trees of steps."""

from __future__ import annotations

import threading
from typing import Any

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
        """nodes => nodes.map(node => [node.classList[1], node.querySelector('.word').textContent,
                                       node.querySelector('.percent')?.textContent ?? ''])"""
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
        """rows => rows.map(row => [...row.querySelectorAll('.cell')].slice(1)
                                   .map(cell => cell.classList.contains('sees') ? 1 : 0).join(''))"""
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
        "“the”, guessed by head 2, rejected, probability 22 %. "
        "It sees the text so far, “To”, “make” and itself, but none of its rivals."
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
        "There was one guess, and the model did not agree with it. Its own token “of” took their place: "
        "one token from one pass, as without Medusa. The text is not harmed."
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
