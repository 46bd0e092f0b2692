"""A bundle as a model of Triton: through a stand-in of Triton's Python backend, `stand_in_triton`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from medusa_export.cli import main
from medusa_runtime import Manifest, MedusaLM
from medusa_serve.triton import ModelSettings, write_model
from medusa_serve.triton.tensors import INPUTS, OUTPUTS
from tests.support import stand_in_triton
from tests.support.cli import fails
from tests.support.stand_in_triton import TritonError, TritonModelException, TritonServer

PROMPT = "the quick brown fox"
GREEDY = json.dumps({"temperature": 0, "max_tokens": 12, "ignore_eos": True})
LONG = json.dumps({"max_tokens": 200, "ignore_eos": True})
FLAGS = {f"return_{name}": True for name in (
    "finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens", "token_ids", "num_accepted",
    "statistics",
)}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    directory = tmp_path_factory.mktemp("repository") / "tiny"
    directory.mkdir()
    write_model(directory, bundle, "tiny", ModelSettings(max_batch_size=4, threads=1, backend="ort-cpu"))
    served = TritonServer(directory)
    yield served
    served.close()


@pytest.fixture(scope="module")
def lm(bundle: Path) -> Iterator[MedusaLM]:
    with MedusaLM.from_bundle(bundle, "ort-cpu", num_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(lm: MedusaLM) -> Any:
    return lm.generate(PROMPT, raw=True, max_new_tokens=12, ignore_eos=True, logprobs=0)


def slow_down(served: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a step take so long that a request of many tokens cannot end before the test has acted."""
    step = served.model._lm.engine.step

    def slow_step() -> Any:
        time.sleep(0.1)
        return step()

    monkeypatch.setattr(served.model._lm.engine, "step", slow_step)


def until(what: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_configuration_is_triton_s(server: TritonServer) -> None:
    config = server.config
    assert config["name"] == "tiny"
    assert config["backend"] == "python"
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_MODEL"}]
    assert config.get("max_batch_size", 0) == 0
    assert all(entry["optional"] for entry in config["input"])
    assert {"text_input", "stream", "sampling_parameters", "exclude_input_in_output"} <= {
        entry["name"] for entry in config["input"]
    }
    assert {key: value["string_value"] for key, value in config["parameters"].items()} == {
        "bundle": "bundle", "backend": "ort-cpu", "device": "auto", "threads": "1", "max_batch_size": "4", "max_queue": "128",
        "allow_engine_code": "False", "spin": "auto",
    }  # fmt: skip


def test_the_whole_answer_comes_in_one_response(server: TritonServer, expected: Any) -> None:
    told = server.ask(text_input=PROMPT, sampling_parameters=GREEDY).only()
    assert told == {"text_output": [PROMPT + expected.text], "index": [0]}
    told = server.ask(text_input=PROMPT, sampling_parameters=GREEDY, exclude_input_in_output=True).only()
    assert told["text_output"] == [expected.text]


def test_a_stream_has_a_response_a_step(server: TritonServer, expected: Any) -> None:
    parts = server.ask(text_input=PROMPT, sampling_parameters=GREEDY, stream=True, **FLAGS).all()
    assert len(parts) > 1
    assert "".join(part["text_output"][0] for part in parts) == expected.text
    assert [token for part in parts for token in part["token_ids"]] == expected.token_ids
    assert [part["finish_reason"] for part in parts] == [["None"]] * (len(parts) - 1) + [["length"]]
    assert sum(part["num_output_tokens"][0] for part in parts) == 12
    assert all(part["num_accepted"][0] == max(len(part["token_ids"]) - 1, 0) for part in parts[1:])
    assert {part["num_input_tokens"][0] for part in parts} == {len(expected.prompt_ids)}
    assert [("statistics" in part) for part in parts] == [False] * (len(parts) - 1) + [True]
    assert json.loads(parts[-1]["statistics"][0])["num_generated_tokens"] == 12
    total = sum(part["cumulative_logprob"][0] for part in parts)
    assert total == pytest.approx(sum(one.logprob for one in expected.logprobs), abs=1e-3)
    first = json.loads(parts[0]["logprobs"][0])[0]
    assert first[str(expected.token_ids[0])]["logprob"] == pytest.approx(expected.logprobs[0].logprob, abs=1e-4)


def test_several_answers_come_side_by_side(server: TritonServer) -> None:
    sampled = json.dumps({"n": 3, "max_tokens": 8, "seed": 5, "temperature": 1.5, "ignore_eos": True})
    whole = server.ask(
        text_input=PROMPT, sampling_parameters=sampled, exclude_input_in_output=True, return_token_ids=True
    ).only()
    assert whole["index"] == [0, 1, 2]
    assert len(whole["token_ids"]) == 24
    texts = ["", "", ""]
    for part in server.ask(text_input=PROMPT, sampling_parameters=sampled, stream=True).all():
        texts[part["index"][0]] += part["text_output"][0]
    assert texts == whole["text_output"]


def test_messages_go_through_the_chat_template(server: TritonServer, lm: MedusaLM) -> None:
    messages = [{"role": "user", "content": "the lazy dog"}]
    told = server.ask(messages=json.dumps(messages), options=json.dumps({"max_new_tokens": 6, "temperature": 0})).only()
    assert told["text_output"] == [lm.generate(messages, max_new_tokens=6).text]


def test_options_can_be_given_in_each_way(server: TritonServer, expected: Any) -> None:
    ways: list[dict[str, Any]] = [
        {"max_tokens": 12, "temperature": 0.0, "options": '{"ignore_eos": true}', "stop_words": "", "bad_words": [""]},
        {"parameters": {"max_tokens": 12, "temperature": "0", "ignore_eos": True, "triton_enable_empty_final_response": True}},
        {"options": json.dumps({"max_new_tokens": 12, "temperature": 0, "ignore_eos": True})},
        {"max_tokens": 12, "sampling_parameters": '{"temperature": 0, "ignore_eos": true, "structured_outputs": null}'},
    ]
    for way in ways:
        told = server.ask(text_input=PROMPT, exclude_input_in_output=True, **way).only()
        assert told["text_output"] == [expected.text]


def test_stop_words_end_the_answer(server: TritonServer, expected: Any) -> None:
    stop = expected.text[3:6]
    told = server.ask(text_input=PROMPT, sampling_parameters=GREEDY, stop_words=[stop, ""], exclude_input_in_output=True).only()
    assert told["text_output"] == [expected.text[: expected.text.index(stop)]]


def test_a_guide_given_as_text_within_text_is_followed(server: TritonServer) -> None:
    parameters = {"max_tokens": 20, "structured_outputs": json.dumps({"choice": ["lazy", "quick"]})}
    told = server.ask(text_input=PROMPT, sampling_parameters=json.dumps(parameters), exclude_input_in_output=True).only()
    assert told["text_output"][0] in {"lazy", "quick"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "one of the inputs text_input and messages"),
    ({"text_input": PROMPT, "messages": "[]"}, "and not both"),
    ({"messages": "[]"}, "there are no messages"),
    ({"messages": "{}"}, "must be a JSON list"),
    ({"messages": "[{]"}, "the input messages is not valid JSON"),
    ({"text_input": b"\xff"}, "not UTF-8"),
    ({"text_input": PROMPT, "sampling_parameters": "3"}, "must be a JSON object"),
    ({"text_input": PROMPT, "sampling_parameters": '{"best_off": 3}'}, "best_off"),
    ({"text_input": PROMPT, "sampling_parameters": '{"temperature": -1}'}, "temperature"),
    ({"text_input": PROMPT, "sampling_parameters": '{"stream": true}'}, "give it as the input stream"),
    ({"text_input": PROMPT, "sampling_parameters": '{"structured_outputs": "{"}'}, "structured_outputs"),
    ({"text_input": PROMPT, "sampling_parameters": '{"top_k": 3}', "top_k": 4}, "give one of them"),
    ({"text_input": PROMPT, "temperature": float("nan")}, "NaN"),
    ({"text_input": PROMPT, "parameters": {"beams": 3}}, "beams"),
    ({"text_input": PROMPT, "bad_words": ["dog"]}, "bad_words is not supported"),
    ({"text_input": PROMPT, "options": '{"max_tokens": 3}'}, "there is no option max_tokens"),
    ({"text_input": PROMPT, "max_tokens": 10**9}, "1000000000"),
    ({"text_input": PROMPT, "stream": True, "exclude_input_in_output": False}, "a stream does not repeat"),
    ({"messages": '[{"role": "user", "content": "a"}]', "exclude_input_in_output": False}, "it needs text_input"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD)
def test_what_cannot_be_answered_is_refused_in_one_line(server: TritonServer, inputs: dict[str, Any], message: str) -> None:
    error = server.ask(**inputs).error()
    assert message in error.message()
    assert "\n" not in error.message()
    assert error.code() == TritonError.INVALID_ARG


def test_requests_are_answered_side_by_side(server: TritonServer, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(server, monkeypatch)
    stream = server.ask(text_input=PROMPT, sampling_parameters=LONG, stream=True)
    assert isinstance(stream.next(), dict)
    others = [server.ask(text_input=PROMPT, sampling_parameters=GREEDY, exclude_input_in_output=True) for _ in range(6)]
    assert [other.only()["text_output"] for other in others] == [[expected.text]] * 6
    stream.go_away()
    assert stream.all()[-1].code() == TritonError.CANCELLED


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server: TritonServer, streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(server, monkeypatch)
    stats = server.model._lm.stats
    until(lambda: stats().num_active == 0)  # what other tests asked for has ended
    before = stats().num_cancelled
    asking = server.ask(text_input=PROMPT, sampling_parameters=LONG, stream=streams)
    until(lambda: stats().num_active == 1)
    asking.go_away()
    *_, last = asking.all()
    assert (last.code(), last.message()) == (TritonError.CANCELLED, "the client cancelled the request")
    until(lambda: stats().num_active == 0)
    assert stats().num_cancelled == before + 1


def test_a_client_that_is_gone_already_takes_no_slot(server: TritonServer) -> None:
    completed = server.model._lm.stats()
    assert server.ask(text_input=PROMPT, is_gone=True).error().code() == TritonError.CANCELLED
    after = server.model._lm.stats()
    assert (after.num_cancelled, after.num_completed) == (completed.num_cancelled, completed.num_completed)


def test_an_unexpected_failure_ends_its_request_alone(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch, expected: Any
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("medusa_serve.triton.answering.make_tensors", fail)
        error = server.ask(text_input=PROMPT, sampling_parameters=GREEDY).error()
    assert (error.message(), error.code()) == ("out of luck", TritonError.INTERNAL)
    assert "out of luck" in stand_in_triton.install().messages[-1]
    assert server.ask(text_input=PROMPT, sampling_parameters=GREEDY).only()["text_output"] == [PROMPT + expected.text]


def test_a_full_queue_and_unloading_are_told(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, bundle, "small", ModelSettings(max_batch_size=1, max_queue=0, threads=1), files="path")
    served = TritonServer(tmp_path)
    slow_down(served, monkeypatch)
    first = served.ask(text_input=PROMPT, sampling_parameters=LONG, stream=True)
    assert isinstance(first.next(), dict)
    refused = served.ask(text_input=PROMPT).error()
    assert (refused.code(), "the queue is full" in refused.message()) == (TritonError.UNAVAILABLE, True)
    served.close()
    assert first.all()[-1].code() == TritonError.UNAVAILABLE
    assert not served.model._thread.is_alive()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_group": [{"count": 2}]}, "2 instances"),
        ({"model_transaction_policy": {}}, "decoupled"),
        ({"parameters": {"bundle": {"string_value": "nowhere"}}}, "nowhere"),
        ({"parameters": {"treads": {"string_value": "1"}}}, "the parameter treads"),
        ({"parameters": {"threads": {"string_value": "two"}}}, "the parameter threads in config.pbtxt is 'two'"),
        (
            {"parameters": {"spin": {"string_value": "never"}}},
            "the parameter spin in config.pbtxt is 'never'; it must be 'auto', 'on' or 'off'",
        ),
        ({"parameters": {"backend": {"string_value": "none"}}}, "'none'"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(bundle: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_model(tmp_path, bundle, "small")
    with pytest.raises(TritonModelException, match=message):
        TritonServer(tmp_path, **changes)


def test_triton_s_own_parameters_are_left_alone() -> None:
    given = {"FORCE_CPU_ONLY_INPUT_TENSORS": {"string_value": "no"}, "threads": {"string_value": "2"}}
    given["spin"] = {"string_value": "off"}
    assert ModelSettings.of(given) == ModelSettings(threads=2, spin="off")


@pytest.mark.parametrize("files", ["copy", "path"])
def test_the_bundle_is_placed_as_asked(bundle: Path, tmp_path: Path, files: Any) -> None:
    name = 'a "name" with \\ and é'
    model = tmp_path / "model"
    model.mkdir()
    source = tmp_path / name
    source.symlink_to(bundle)
    write_model(model, source, "m", files=files)
    place = Path(stand_in_triton.read_config(model / "config.pbtxt")["parameters"]["bundle"]["string_value"])
    if files == "path":
        assert place == bundle.resolve()
        return
    placed = model / "1" / place
    assert Manifest.load(placed) == Manifest.load(bundle)
    assert not (placed / "manifest.json").samefile(bundle / "manifest.json")
    assert {file.stat().st_nlink for file in bundle.iterdir()} == {1}  # onnx refuses weights that have several links
    assert {entry.name for entry in placed.iterdir()} == {entry.name for entry in bundle.iterdir()}


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["triton", *map(str, words)])


def test_the_command_writes_a_model_beside_others(bundle: Path, tmp_path: Path, expected: Any) -> None:
    (tmp_path / "other").mkdir()
    result = run(
        bundle, "-o", tmp_path, "--name", "tiny", "--threads", 1, "--max-batch-size", 2, "--backend", "ort-cpu", "--spin", "off"
    )
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'tiny'}\n")
    assert {entry.name for entry in tmp_path.iterdir()} == {"other", "tiny"}
    served = TritonServer(tmp_path / "tiny")
    assert served.model._lm.engine.max_batch_size == 2
    settings = served.model._lm.engine.backend._heads_session.get_session_options()
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    told = served.ask(text_input=PROMPT, sampling_parameters=GREEDY, exclude_input_in_output=True).only()
    served.close()
    assert told["text_output"] == [expected.text]


def test_the_command_replaces_its_own_output_alone(bundle: Path, tmp_path: Path) -> None:
    assert run(bundle, "-o", tmp_path).stdout == f"{tmp_path / bundle.name}\n"
    fails(run(bundle, "-o", tmp_path), 2, "replace it with --force")
    assert run(bundle, "-o", tmp_path, "--force", "--files", "path").exit_code == 0
    assert not (tmp_path / bundle.name / "1" / "bundle").exists()
    (tmp_path / bundle.name / "2").mkdir()
    fails(run(bundle, "-o", tmp_path, "--force"), 2, "not an earlier output")


def test_the_command_refuses_what_it_cannot_write(bundle: Path, tmp_path: Path) -> None:
    fails(run(bundle, "-o", tmp_path, "--name", "a/b"), 2, "the model's name is 'a/b'")
    fails(run(tmp_path / "none", "-o", tmp_path), 1, "not a bundle")
    assert list(tmp_path.iterdir()) == []


def test_the_docs_name_every_tensor() -> None:
    text = (Path(__file__).parents[2] / "docs" / "triton.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    assert {spec.name for spec in (*INPUTS, *OUTPUTS)} <= named
