"""The responses API over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving.test_chat import MESSAGES, PARAMETERS
from tests.support.server import Running

PATH = "/v1/responses"
TOOLS = [{"type": "function", "name": "weather", "parameters": PARAMETERS}]


def ask(server: Running, given: Any = "the quick brown fox", **fields: Any) -> Any:
    response = server.post(PATH, {"input": given, "temperature": 0, "max_output_tokens": 12, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_an_input_is_answered_as_in_a_chat(server: Running) -> None:
    told = ask(server)
    [item] = told["output"]
    [part] = item["content"]
    assert (item["type"], item["role"], part["type"]) == ("message", "assistant", "output_text")
    assert part["text"] == server.lm.generate(MESSAGES, max_new_tokens=12).text
    assert (told["status"], told["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert told["usage"]["output_tokens"] == 12
    assert told["usage"]["total_tokens"] == 12 + told["usage"]["input_tokens"]


def test_items_become_messages(server: Running) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "fox"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "dog", "annotations": []}]},
        {"role": "user", "content": "over"},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call_output", "call_id": "1", "output": "sun"},
    ]
    told = ask(server, items, instructions="be brief", tools=TOOLS, max_output_tokens=2)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "fox"},
        {"role": "assistant", "content": "dog", "reasoning_content": "hm"},
        {"role": "user", "content": "over"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]
    chat_tools = [{"type": "function", "function": {"name": "weather"}}]
    count = server.post("/tokenize", {"messages": messages, "tools": chat_tools}).json()["count"]
    assert told["usage"]["input_tokens"] == count


def test_a_stream_tells_every_part_in_order(server: Running) -> None:
    events = server.events(PATH, {"input": "the quick brown fox", "temperature": 0, "max_output_tokens": 12})
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names = [event["type"] for event in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    tail = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert names[-4:] == [f"response.{name}" for name in tail]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    whole = ask(server)
    assert text == events[-1]["response"]["output"][0]["content"][0]["text"] == whole["output"][0]["content"][0]["text"]
    assert events[-1]["response"]["usage"]["output_tokens"] == 12


def test_an_answer_follows_its_schema(server: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    told = ask(server, text={"format": {"type": "json_schema", "name": "x", "schema": schema}}, max_output_tokens=40)
    assert json.loads(told["output"][0]["content"][0]["text"])["a"] in {1, 2}
    assert told["status"] == "completed"


def test_a_call_is_an_item(server: Running) -> None:
    words = {"tools": TOOLS, "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 60}
    [item] = ask(server, **words)["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "weather", "completed")
    json.loads(item["arguments"])
    events = server.events(PATH, {"input": "the quick brown fox", "temperature": 0, **words})
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == events[-1]["response"]["output"][0]["arguments"] == item["arguments"]
    assert events[-1]["type"] == "response.completed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"conversation": "c"}, "conversation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server: Running, fields: dict[str, Any], param: str) -> None:
    response = server.post(PATH, {"input": "x"} | fields)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"].startswith(param), error


def test_tokens_of_the_reasoning_are_counted(server: Running) -> None:
    """The reasoning is as long as an answer may be, since the prompt opens it and the model never ends it."""
    words = {"chat_template_kwargs": {"thinks": True}, "max_output_tokens": 12}
    told = ask(server, **words)
    [item] = told["output"]
    assert item["type"] == "reasoning"
    assert 0 < told["usage"]["output_tokens_details"]["reasoning_tokens"] <= 12
    assert ask(server)["usage"]["output_tokens_details"]["reasoning_tokens"] == 0
