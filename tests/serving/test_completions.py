"""Completions and token endpoints over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from medusa_runtime import GenerationOptions
from tests.support.server import Running

PATH, PROMPT = "/v1/completions", "the quick brown"


def ask(server: Running, prompt: Any = PROMPT, **fields: Any) -> Any:
    response = server.post(PATH, {"prompt": prompt, "temperature": 0, "max_tokens": 12, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text_is_continued_as_the_runtime_does(server: Running) -> None:
    [choice] = ask(server)["choices"]
    result = server.lm.generate(PROMPT, raw=True, max_new_tokens=12)
    assert (choice["text"], choice["finish_reason"]) == (result.text, "length")
    assert server.post(PATH, {"prompt": PROMPT, "temperature": 0}).json()["usage"]["completion_tokens"] <= 16


def test_prompts_may_be_texts_or_tokens_and_many(server: Running) -> None:
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    alone = ask(server)["choices"][0]["text"]
    assert ask(server, ids)["choices"][0]["text"] == alone
    other = ask(server, "a small model")["choices"][0]["text"]
    told = ask(server, [PROMPT, "a small model", PROMPT], n=1)
    assert [choice["text"] for choice in told["choices"]] == [alone, other, alone]
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    assert ask(server, [ids, PROMPT])["choices"][1]["text"] == alone
    drawn = ask(server, [PROMPT, "a small model"], n=2, temperature=1.0, seed=5)["choices"]
    expected = server.lm.generate("a small model", GenerationOptions(raw=True, n=2, temperature=1, seed=5, max_new_tokens=12))
    assert [choice["text"] for choice in drawn[2:]] == [choice.text for choice in expected.choices]


def test_many_prompts_stream_side_by_side(server: Running) -> None:
    body = {"prompt": [PROMPT, "a small model"], "temperature": 0, "max_tokens": 12, "stream_options": {"include_usage": True}}
    *chunks, last, done = server.events(PATH, body)
    assert done == "[DONE]"
    texts = ["", ""]
    for choice in [one for chunk in chunks for one in chunk["choices"]]:
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in ask(server, body["prompt"])["choices"]]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 24)


def test_a_prompt_can_be_echoed_and_scored(server: Running) -> None:
    plain = ask(server)["choices"][0]["text"]
    assert ask(server, echo=True)["choices"][0]["text"] == PROMPT + plain
    events = server.events(PATH, {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "echo": True})
    assert "".join(choice["text"] for chunk in events[:-1] for choice in chunk["choices"]) == PROMPT + plain
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    scored = ask(server, echo=True, logprobs=2, max_tokens=0)["choices"][0]
    assert scored["text"] == PROMPT
    logprobs = scored["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == len(ids)
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    own = server.lm.generate(ids, prompt_logprobs=0, max_new_tokens=0).prompt_logprobs
    assert logprobs["token_logprobs"][1:] == pytest.approx([one.logprob for one in own or []])


def test_log_probabilities_have_places_in_the_text(server: Running) -> None:
    choice = ask(server, logprobs=1, max_tokens=8)["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == 8
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    events = server.events(PATH, {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "logprobs": 1})
    parts = [choice["logprobs"] for chunk in events[:-1] for choice in chunk["choices"]]
    assert [token for part in parts for token in part["tokens"]] == logprobs["tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 200}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"add_special_tokens": False}, "add_special_tokens"),
        ({"stream": True, "echo": True, "logprobs": 1}, "logprobs"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprobs": True, "tools": []}, "tools"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server: Running, fields: dict[str, Any], param: str) -> None:
    response = server.post(PATH, {"prompt": PROMPT} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"].partition(".")[0]) == (400, param), error


def test_ids_outside_the_vocabulary_are_refused(server: Running) -> None:
    for body in ({"prompt": [10**6]}, {"prompt": [10**30]}):
        response = server.post(PATH, body)
        assert (response.status_code, "vocabulary" in response.text) == (400, True)
    response = server.post("/detokenize", {"tokens": [10**6]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


def test_text_becomes_tokens_and_text_again(server: Running) -> None:
    text = "a small model 🤖 é"
    told = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == server.lm.manifest.limits.max_seq_len
    assert server.post("/detokenize", {"tokens": told["tokens"], "skip_special_tokens": True}).json()["prompt"] == text
    messages = [{"role": "user", "content": "fox"}]
    chat = server.post("/tokenize", {"messages": messages}).json()
    answered = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json()
    assert chat["count"] == answered["usage"]["prompt_tokens"]
    assert server.post("/tokenize", {"messages": messages, "prompt": "x"}).status_code == 400
    assert server.post("/tokenize", {"prompt": "x", "tools": []}).status_code == 400
