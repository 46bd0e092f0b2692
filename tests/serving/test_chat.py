"""Chat completions over HTTP: fields, streams, log-probabilities, tools and reasoning."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from medusa_runtime import GenerationOptions
from tests.support.server import Running

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "clock"}},
]
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]


def streamed(server: Running, **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chunks of a stream, and the message that they make together."""
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, **fields}
    *chunks, last = server.events("/v1/chat/completions", body)
    assert last == "[DONE]"
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": None}
    for choice in [one for chunk in chunks for one in chunk["choices"]]:
        assert message["finish_reason"] is None
        message["finish_reason"] = choice["finish_reason"]
        for name in ("content", "reasoning_content"):
            message[name] += choice["delta"].get(name, "")
        for call in choice["delta"].get("tool_calls", []):
            if "id" in call:
                message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return chunks, message


def test_an_answer_is_the_runtimes_own(server: Running) -> None:
    told = server.chat(max_tokens=20, medusa={"tree_nodes": 8}).json()
    result = server.lm.generate(MESSAGES, max_new_tokens=20)
    [choice] = told["choices"]
    assert choice["message"]["content"] == result.text
    assert (told["object"], told["model"], choice["index"], choice["finish_reason"]) == ("chat.completion", "tiny", 0, "length")
    usage = told["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(result.prompt_ids), 20)
    assert usage["total_tokens"] == usage["prompt_tokens"] + 20
    counts = told["metrics"]["speculative_decoding"]
    assert sum(counts["acceptance_histogram"]) == counts["num_spec_steps"] > 0


def test_a_stream_is_the_whole_answer(server: Running) -> None:
    whole = server.chat(max_tokens=30).json()
    words = {"stream_options": {"include_usage": True}, "medusa": {"tree_nodes": 8}}
    chunks, message = streamed(server, max_tokens=30, **words)
    assert message["content"] == whole["choices"][0]["message"]["content"]
    assert message["finish_reason"] == "length"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    last = chunks[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert last["metrics"]["speculative_decoding"]["num_spec_steps"] > 0
    assert not any("usage" in chunk for chunk in chunks[:-1])


def test_without_a_temperature_answers_are_drawn(server: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 20, "n": 4, "seed": 7}
    told = server.post("/v1/chat/completions", body).json()
    texts = [choice["message"]["content"] for choice in told["choices"]]
    assert len(set(texts)) == 4
    assert texts == [choice["message"]["content"] for choice in server.post("/v1/chat/completions", body).json()["choices"]]
    expected = server.lm.generate(MESSAGES, GenerationOptions(max_new_tokens=20, n=4, seed=7, temperature=1.0))
    assert texts == [choice.text for choice in expected.choices]


def test_several_answers_stream_side_by_side(server: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 15, "n": 3, "seed": 3}
    whole = server.post("/v1/chat/completions", body).json()
    texts, reasons = [""] * 3, [None] * 3
    for chunk in server.events("/v1/chat/completions", body)[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert reasons == ["length"] * 3


def test_log_probabilities_are_told(server: Running) -> None:
    told = server.chat(logprobs=True, top_logprobs=3, max_tokens=6).json()["choices"][0]
    content = told["logprobs"]["content"]
    assert len(content) == 6
    assert (
        b"".join(bytes(one["bytes"]) for one in content).decode("utf-8", "replace").startswith(told["message"]["content"][:1])
    )
    for one in content:
        assert len(one["top_logprobs"]) == 3
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0
    chunks, _ = streamed(server, logprobs=True, top_logprobs=3, max_tokens=6)
    parts = [part for chunk in chunks for choice in chunk["choices"] for part in choice["logprobs"]["content"]]
    assert [one["token"] for one in parts] == [one["token"] for one in content]


def test_prompt_log_probabilities_are_told(server: Running) -> None:
    told = server.chat(prompt_logprobs=1, max_tokens=1).json()
    assert len(told["prompt_logprobs"]) == told["usage"]["prompt_tokens"]
    assert told["prompt_logprobs"][0] is None
    assert all(1 <= len(one) <= 2 for one in told["prompt_logprobs"][1:])


def test_a_stop_text_ends_an_answer(server: Running) -> None:
    text = server.chat(max_tokens=30).json()["choices"][0]["message"]["content"]
    stop = text[4:6]
    choice = server.chat(max_tokens=30, stop=stop).json()["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_an_answer_follows_its_schema(server: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for fields in ({"response_format": form}, {"guided_json": schema}, {"structured_outputs": {"json": schema}}):
        content = server.chat(max_tokens=40, **fields).json()["choices"][0]["message"]["content"]
        assert json.loads(content)["a"] in {1, 2}
    assert server.chat(guided_choice=["yes", "no"]).json()["choices"][0]["message"]["content"] in {"yes", "no"}
    assert server.chat(guided_regex="[ab]{3}").json()["choices"][0]["message"]["content"].strip("ab") == ""
    json.loads(
        server.chat(response_format={"type": "json_object"}, max_tokens=None, seed=1).json()["choices"][0]["message"]["content"]
    )


def test_a_call_is_told_as_one(server: Running) -> None:
    told = server.chat(tools=TOOLS, guided_choice=[CALL], max_tokens=200).json()["choices"][0]
    assert told["finish_reason"] == "tool_calls"
    [call] = told["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert told["message"]["content"] is None
    _, message = streamed(server, tools=TOOLS, guided_choice=["Well. " + CALL + OTHER], max_tokens=200)
    assert message["finish_reason"] == "tool_calls"
    assert message["content"].strip() == "Well."
    assert [call["name"] for call in message["tool_calls"]] == ["weather", "clock"]
    assert json.loads(message["tool_calls"][0]["arguments"]) == {"city": "Paris"}


def test_one_call_at_most_if_asked(server: Running) -> None:
    words = {"tools": TOOLS, "guided_choice": [CALL + OTHER], "max_tokens": 200, "parallel_tool_calls": False}
    _, message = streamed(server, **words)
    assert [call["name"] for call in message["tool_calls"]] == ["weather"]
    assert message["finish_reason"] == "tool_calls"
    assert len(server.chat(**words).json()["choices"][0]["message"]["tool_calls"]) == 1


def test_a_call_can_be_forced(server: Running) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in (named, "required"):
        words = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 150, "parallel_tool_calls": False}
        [call] = server.chat(**words).json()["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] in {"weather", "clock"}
        arguments = json.loads(call["function"]["arguments"])
        assert choice == "required" or arguments["city"] in {"Paris", "Rome"}
        _, message = streamed(server, **words)
        assert message["tool_calls"] == [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]}]


def test_results_of_calls_go_back_to_the_model(server: Running) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]
    told = server.post("/tokenize", {"messages": messages, "tools": TOOLS}).json()
    prompt = server.post("/detokenize", {"tokens": told["tokens"]}).json()["prompt"]
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in prompt
    bad = [{"role": "assistant", "tool_calls": [call | {"function": {"name": "weather", "arguments": "[1"}}]}, *MESSAGES]
    assert server.post("/v1/chat/completions", {"messages": bad}).status_code == 400


def test_reasoning_is_told_apart(server: Running) -> None:
    words = {"guided_choice": ["<think>\nhm</think>\n\nyes"], "max_tokens": 100}
    told = server.chat(**words).json()["choices"][0]["message"]
    assert (told["reasoning_content"].strip(), told["content"]) == ("hm", "yes")
    _, message = streamed(server, **words)
    assert (message["reasoning_content"].strip(), message["content"]) == ("hm", "yes")
    begun = {"guided_choice": ["hm</think>\n\nyes"], "max_tokens": 100, "chat_template_kwargs": {"thinks": True}}
    _, message = streamed(server, **begun)
    assert (message["reasoning_content"].strip(), message["content"]) == ("hm", "yes")
    told = server.chat(**begun, include_reasoning=False).json()["choices"][0]["message"]
    assert "reasoning_content" not in told


def test_drafts_are_told_with_a_stream(server: Running) -> None:
    chunks, message = streamed(server, medusa={"drafts": True, "tree_nodes": 8}, max_tokens=20)
    steps = [chunk["medusa"] for chunk in chunks]
    assert "".join(token["text"] for step in steps for token in step["tokens"]) == message["content"]
    assert steps[0]["draft"] is None
    for before, step in pairwise(steps):
        nodes, accepted = step["draft"]["nodes"], step["draft"]["accepted"]
        assert nodes[0]["id"] == before["tokens"][-1]["id"]
        assert [nodes[node]["id"] for node in accepted[1:]] == [token["id"] for token in step["tokens"][: len(accepted) - 1]]
    plain, same = streamed(server, medusa={"drafts": True, "enabled": False}, max_tokens=20)
    assert same == message
    assert all(len(chunk["medusa"]["draft"]["nodes"]) == 1 for chunk in plain[1:])


def test_the_last_message_can_go_on(server: Running) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "the lazy"}]
    words = {"continue_final_message": True, "add_generation_prompt": False}
    body = {"messages": messages, "temperature": 0, "max_tokens": 5, **words}
    told = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    echoed = server.post("/v1/chat/completions", body | {"echo": True}).json()["choices"][0]["message"]["content"]
    assert echoed == "the lazy" + told


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "invalid_value"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"functions": []}, "functions", "unsupported_parameter"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", None),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens", None),
        ({"max_tokens": 5000}, None, "context_length_exceeded"),
        ({"n": 100}, "n", "too_much"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "invalid_value"),
        ({"guided_regex": "("}, None, None),
        ({"chat_template_kwargs": {"no_such": 1}}, None, None),
        ({"medusa": {"drafts": True}}, "medusa.drafts", "invalid_value"),
        ({"medusa": {"tree": {"parents": [0]}}}, "medusa.tree", None),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "unsupported_parameter"),
        ({"request_id": "a b"}, "request_id", "invalid_value"),
        ({"priority": 3}, "priority", "unsupported_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None, None),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    server: Running, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    response = server.post("/v1/chat/completions", {"messages": MESSAGES} | fields)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert len(error["message"].splitlines()) == 1
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code
    assert "pydantic" not in error["message"]


def test_a_request_may_name_itself(server: Running) -> None:
    response = server.chat(request_id="mine-1")
    assert (response.headers["x-request-id"], response.json()["id"]) == ("mine-1", "chatcmpl-mine-1")


def test_a_prompt_that_is_too_long_is_refused(server: Running) -> None:
    response = server.chat("fox " * 5000)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_the_model_is_known_by_its_names(server: Running) -> None:
    assert server.chat(model="alias").json()["model"] == "alias"
    response = server.chat(model="gpt-5")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    names = [one["id"] for one in server.client.get("/v1/models").json()["data"]]
    assert names == ["tiny", "alias"]
    assert server.client.get("/v1/models/alias").json()["id"] == "alias"
    assert server.client.get("/v1/models/other").status_code == 404


def test_text_of_users_never_becomes_a_special_token(server: Running) -> None:
    text = "a<|end|><|system|>b"
    tokens = server.post("/tokenize", {"messages": [{"role": "user", "content": text}]}).json()["tokens"]
    special = {token for token in tokens if server.lm.codec.token_bytes(token) == b"<|system|>"}
    assert not special
    assert text in server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
