"""OpenAI's own Python client: chat, completions, responses, tools, streams, helpers, errors and retries."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.support.raw_http import eventually
from tests.support.server import Running, serving

KEY = "sk-0123456789abcdef"
MESSAGES: Any = [{"role": "user", "content": "the quick brown fox"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}]
FUNCTIONS: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}]


class Verdict(BaseModel):
    """What an answer is parsed into."""

    word: Literal["yes", "no"]
    count: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def server(tools_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY, encoding="utf-8")
    names = ("tiny", "gpt-tiny")
    with serving(tools_bundle, served_model_name=names, api_key_file=keys, max_batch_size=2, max_queue=2) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as found:
        yield found


# Models


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "gpt-tiny"]
    assert client.models.retrieve("gpt-tiny").owned_by == "medusa-export"


# Chat


def test_chat(client: OpenAI, server: Running) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=8, temperature=0)
    expected = server.lm.generate(MESSAGES, max_new_tokens=8).text
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    streamed = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_chats_options(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="gpt-tiny",
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "fox"}]}],
        n=2,
        seed=3,
        temperature=0.8,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        logit_bias={"5": -100},
        stop=["zzz"],
        logprobs=True,
        top_logprobs=2,
        max_tokens=6,
        user="me",
        metadata={"a": "b"},
        service_tier="auto",
        store=False,
        parallel_tool_calls=True,
        response_format={"type": "text"},
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "medusa": {"tree_nodes": 8}},
    )
    assert len(answer.choices) == 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert all(len(one.top_logprobs) == 2 for one in logprobs.content)


def test_the_helper_for_streams(client: OpenAI) -> None:
    words: Any = {"model": "tiny", "messages": MESSAGES, "extra_body": {"guided_choice": ["all is well"]}}
    with client.chat.completions.stream(**words) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == "all is well"
    assert final.choices[0].finish_reason == "stop"


def test_answers_are_parsed_into_models(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Verdict, max_tokens=60, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Verdict)
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, response_format=Verdict, max_tokens=60, temperature=0
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


def test_an_answer_that_is_cut_off_is_told_so(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Verdict, max_tokens=2, temperature=0)


# Tools


def test_a_tools_round_trip(client: OpenAI) -> None:
    words: Any = {"model": "tiny", "tools": TOOLS, "max_tokens": 150}
    first = client.chat.completions.create(**words, messages=MESSAGES, extra_body={"guided_choice": [CALL]})
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    told = [*MESSAGES, message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(**words, messages=told, extra_body={"guided_choice": ["It is sunny."]})
    assert second.choices[0].message.content == "It is sunny."


def test_calls_are_streamed(client: OpenAI) -> None:
    words: Any = {"model": "tiny", "tools": TOOLS, "max_tokens": 150, "messages": MESSAGES}
    with client.chat.completions.stream(**words, extra_body={"guided_choice": [CALL + CALL]}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds.count("tool_calls.function.arguments.done") == 2
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Paris"}] * 2
    assert len({call.id for call in calls}) == 2


def test_calls_are_parsed_into_models(client: OpenAI) -> None:
    tool = openai.pydantic_function_tool(Verdict, name="decide")
    answer = client.chat.completions.parse(
        model="tiny",
        messages=MESSAGES,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "decide"}},
        max_tokens=80,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, Verdict)


# Completions


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="the quick", max_tokens=6, temperature=0, logprobs=2, echo=True)
    assert answer.choices[0].text.startswith("the quick")
    assert answer.choices[0].logprobs is not None
    several = client.completions.create(model="tiny", prompt=["the quick", "a lazy"], max_tokens=4, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1]
    chunks = list(client.completions.create(model="tiny", prompt="the quick", max_tokens=6, temperature=0, stream=True))
    assert "the quick" + "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


# Responses


def test_responses(client: OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="the quick brown fox", max_output_tokens=8, temperature=0)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens == 8
    again = client.responses.create(
        model="tiny",
        instructions="be brief",
        input=[{"role": "user", "content": "fox"}, *answer.output, {"role": "user", "content": "go on"}],  # type: ignore[list-item]
        max_output_tokens=4,
    )
    assert again.output_text is not None


def test_responses_are_streamed(client: OpenAI) -> None:
    words: Any = {"model": "tiny", "input": "fox", "max_output_tokens": 80, "temperature": 0, "text_format": Verdict}
    whole = client.responses.parse(**words)
    with client.responses.stream(**words) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == final.output_text
    assert final.output_parsed == whole.output_parsed
    assert [event.sequence_number for event in seen] == sorted(event.sequence_number for event in seen)


def test_responses_are_parsed_into_models(client: OpenAI) -> None:
    answer = client.responses.parse(model="tiny", input="fox", text_format=Verdict, max_output_tokens=80, temperature=0)
    assert isinstance(answer.output_parsed, Verdict)


def test_responses_call_functions(client: OpenAI) -> None:
    choice: Any = {"type": "function", "name": "weather"}
    words: Any = {"model": "tiny", "tools": FUNCTIONS, "max_output_tokens": 60, "temperature": 0}
    first = client.responses.create(**words, input="fox", tool_choice=choice)
    [call] = [item for item in first.output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in {"Paris", "Rome"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = client.responses.create(**words, input=[{"role": "user", "content": "fox"}, call, result], tool_choice="none")  # type: ignore[list-item]
    assert second.status in {"completed", "incomplete"}


# asyncio


def test_the_client_for_asyncio(server: Running) -> None:
    async def run() -> list[str | None]:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=5) as client:
            whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
            stream = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, stream=True
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            async with client.responses.stream(model="tiny", input="fox", max_output_tokens=4) as events:
                kinds = [event.type async for event in events]
            assert kinds[0] == "response.created"
            return [(await whole).choices[0].message.content, text]

    whole, streamed = asyncio.run(run())
    assert whole == streamed


# Errors


def test_each_error_is_of_its_class(server: Running, client: OpenAI) -> None:
    def ask(**words: Any) -> Any:
        return client.chat.completions.create(**({"model": "tiny", "messages": MESSAGES, "max_tokens": 2} | words))

    with pytest.raises(openai.BadRequestError, match="temperature") as told:
        ask(temperature=-1)
    assert (told.value.param, told.value.code, told.value.type) == ("temperature", "invalid_value", "invalid_request_error")
    assert told.value.request_id
    with pytest.raises(openai.BadRequestError) as told:
        ask(messages=[{"role": "user", "content": "fox " * 3000}])
    assert told.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="gpt-7")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as closed:
        client.with_options(api_key="wrong").models.list()
    assert closed.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.APIStatusError) as large:
        ask(messages=[{"role": "user", "content": "x" * 5_000_000}])
    assert large.value.status_code == 413
    with pytest.raises(openai.UnprocessableEntityError) as unfollowable:
        ask(extra_body={"guided_grammar": 'start: "x" c\nc: ' + " | ".join(["b"] * 3000) + '\nb: "x" | "y"'})
    assert unfollowable.value.code == "cannot_be_followed"
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")


class Full:
    """Requests that fill the server's queue until they are let go."""

    def __init__(self, server: Running) -> None:
        self._step, self._backend = server.lm.engine.backend.step, server.lm.engine.backend
        self._server, self._goes = server, threading.Event()

    def __enter__(self) -> Self:
        def step(*args: Any, **words: Any) -> Any:
            assert self._goes.wait(30)
            return self._step(*args, **words)

        self._backend.step = step  # type: ignore[method-assign]
        self._handles = [self._server.lm.submit("fox", max_new_tokens=3, n=4)]
        assert eventually(lambda: self._server.lm.stats().num_active == 2)
        return self

    def let_go(self) -> None:
        self._goes.set()

    def __exit__(self, *_: object) -> None:
        self.let_go()
        self._backend.step = self._step  # type: ignore[method-assign]
        for handle in self._handles:
            handle.result()


def test_a_full_queue_is_a_rate_limit(server: Running, client: OpenAI) -> None:
    with Full(server), pytest.raises(openai.RateLimitError) as told:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
    assert told.value.code == "queue_full"
    assert told.value.response.headers["retry-after"] == "1"


def test_the_client_tries_again(server: Running, client: OpenAI) -> None:
    with Full(server) as full:
        timer = threading.Timer(0.5, full.let_go)
        timer.start()
        trying = client.with_options(max_retries=5).chat.completions
        answer = trying.create(model="tiny", messages=MESSAGES, max_tokens=2, temperature=0)  # drawn, it could end at once
        timer.join()
    assert answer.choices[0].finish_reason == "length"


def test_a_server_that_ends_is_unavailable(tools_bundle: Path) -> None:
    with serving(tools_bundle) as running, OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        running.server.state.phase = "draining"
        with pytest.raises(openai.InternalServerError) as told:
            client.chat.completions.create(model=running.server.state.name, messages=MESSAGES)
        assert (told.value.status_code, told.value.code) == (503, "not_ready")


def test_an_error_in_mid_stream_is_raised(server: Running, client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    server.server.state.stop_all()
    server.server.state._stopped = None  # the server itself goes on
    with pytest.raises(openai.APIError, match="shut down"):
        list(stream)


def test_closing_a_stream_frees_its_slot(server: Running, client: OpenAI) -> None:
    before = server.lm.stats().num_cancelled
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    stream.close()
    server.wait_until_idle()
    assert server.lm.stats().num_cancelled + server.lm.stats().num_completed > before


def test_raw_responses_have_an_id(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=MESSAGES, max_tokens=2, extra_headers={"X-Request-Id": "mine"}
    )
    assert (raw.status_code, raw.headers["x-request-id"]) == (200, "mine")
    assert raw.parse().id == "chatcmpl-mine"
    assert raw.parse()._request_id == "mine"
