"""The items of a response, made of deltas."""

from __future__ import annotations

import itertools
from typing import Any

from medusa_serve.endpoints.items import Items
from medusa_serve.parsing import Delta, MessageParser

TEXT = (
    '<think>\nhm</think>\n\nWell. <tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)


def events_of(pieces: list[str]) -> tuple[list[dict[str, Any]], Items]:
    parser, items = MessageParser("hermes", "think", tool_names=["weather", "clock"]), Items("x")
    deltas: list[Delta] = [*(parser.push(piece) for piece in pieces), parser.finish()]
    told = [event for delta in deltas for event in items.push(delta)]
    return [*told, *items.close("completed")], items


def test_items_come_one_after_the_other_however_the_text_is_cut() -> None:
    for size in (1, 3, 7, 1000):
        events, items = events_of([TEXT[start : start + size] for start in range(0, len(TEXT), size)])
        assert [item["type"] for item in items.done] == ["reasoning", "message", "function_call", "function_call"]
        assert items.done[0]["content"][0]["text"].strip() == "hm"
        assert items.done[1]["content"][0]["text"].strip() == "Well."
        assert [item["name"] for item in items.done[2:]] == ["weather", "clock"]
        assert {item["status"] for item in items.done} == {"completed"}
        added = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
        done = [event["output_index"] for event in events if event["type"] == "response.output_item.done"]
        assert added == done == [0, 1, 2, 3]
        for place, item in enumerate(items.done):
            deltas = [event["delta"] for event in events if event["type"].endswith(".delta") and event["output_index"] == place]
            assert "".join(deltas) == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
        assert len({item["id"] for item in items.done}) == 4


def test_an_item_ends_before_the_next_begins() -> None:
    events, _ = events_of([TEXT])
    order = [event["type"].removeprefix("response.output_item.") for event in events if ".output_item." in event["type"]]
    assert order == ["added", "done"] * 4
    for before, after in itertools.pairwise(events):
        assert before["output_index"] <= after["output_index"]


def test_an_answer_that_was_cut_has_an_incomplete_item() -> None:
    items = Items("x")
    assert list(items.close("completed")) == []
    list(items.push(Delta(content="half")))
    *_, last = items.close("incomplete")
    assert last["item"]["status"] == "incomplete"
