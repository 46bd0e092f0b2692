"""Answers in every format are split into reasoning, content and calls; how the text is cut does not matter."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_serve.parsing import Delta, MessageParser, ParsedMessage, ToolCallDelta, join

NAMES = ("get_weather", "get_time")
FORMATS = ("hermes", "llama3", "mistral", "json", "arguments", None)
WEATHER = '{"city": "Paris"}'
TIME = '{"zone": "UTC", "at": {"n": [1, 2.5e3, null]}}'


def make_parser(tool_format: str | None, reasoning: str | None = None, **options: Any) -> MessageParser:
    names = NAMES[:1] if tool_format == "arguments" else NAMES
    counter = itertools.count()
    options = {"tool_names": names, "new_id": lambda: f"id{next(counter)}"} | options
    return MessageParser(tool_format, reasoning, **options)


def deltas_of(parser: MessageParser, pieces: Iterable[str]) -> list[Delta]:
    return [*(parser.push(piece) for piece in pieces), parser.finish()]


def parse(text: str, tool_format: str | None, reasoning: str | None = None, **options: Any) -> ParsedMessage:
    """Parse a text in one piece, and check that its single characters give the same."""
    whole = join(deltas_of(make_parser(tool_format, reasoning, **options), [text]))
    assert join(deltas_of(make_parser(tool_format, reasoning, **options), text)) == whole
    return whole


def calls_of(message: ParsedMessage) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in message.tool_calls]


TWO_CALLS = [("get_weather", WEATHER), ("get_time", TIME)]
A = f'{{"name": "get_weather", "arguments": {WEATHER}}}'
B = f'{{"name": "get_time", "arguments": {TIME}}}'
A_SWAPPED = f'{{"arguments":{WEATHER},"name":"get_weather"}}'
B_LONGER = f'{{"name":"get_time","why": ["x", 1e5], "parameters":{TIME}, "id": "x1"}}'
A_LLAMA = f'{{"type": "function", "name": "get_weather", "parameters": {WEATHER}}}'
B_LLAMA = f'{{"name": "get_time", "parameters": {TIME}}}'
TAG = "<|python_tag|>"
WELL_FORMED = [
    ("hermes", f"<tool_call>\n{A}\n</tool_call>\n<tool_call>\n{B}\n</tool_call>"),
    ("hermes", f"<tool_call>{A_SWAPPED}</tool_call><tool_call>{B_LONGER}</tool_call>\n\n"),
    ("hermes", f"<tool_call>{A}<tool_call>{B}"),  # models forget the closing tag at times
    ("llama3", f"{A_LLAMA}; {B_LLAMA}"),
    ("llama3", f"{TAG}{A_LLAMA};{B_LLAMA}"),
    ("llama3", f"{TAG}{A_LLAMA}\n{TAG}{B_LLAMA}\n"),
    ("mistral", f"[TOOL_CALLS][{A}, {B}]"),
    ("mistral", f"[TOOL_CALLS] [{A_SWAPPED},\n{B_LONGER} ]"),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]id0[ARGS]{WEATHER}[TOOL_CALLS]get_time[CALL_ID]id1[ARGS]{TIME}"),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]get_time[ARGS]{TIME}"),
    ("mistral", f"[TOOL_CALLS]get_weather{WEATHER}[TOOL_CALLS]get_time{TIME}"),
    ("json", f"[{A_LLAMA}, {B_LLAMA}]"),
]
MARKED_APART = [  # each call has a marker of its own
    (name, text) for name, text in WELL_FORMED if any(text.count(mark) == 2 for mark in ("<tool_call>", "[TOOL_CALLS]", TAG))
]


@pytest.mark.parametrize(("tool_format", "text"), WELL_FORMED)
def test_calls_are_found(tool_format: str, text: str) -> None:
    message = parse(text, tool_format)
    assert calls_of(message) == TWO_CALLS
    assert message.content == ""
    assert [call.id for call in message.tool_calls] == ["id0", "id1"]


@pytest.mark.parametrize(("tool_format", "text"), [entry for entry in WELL_FORMED if entry[0] in {"hermes", "mistral"}])
def test_text_before_calls_is_content(tool_format: str, text: str) -> None:
    message = parse("I will look.\n" + text, tool_format)
    assert message.content == "I will look."
    assert calls_of(message) == TWO_CALLS


@pytest.mark.parametrize(("tool_format", "text"), WELL_FORMED)
def test_without_functions_everything_is_content(tool_format: str, text: str) -> None:
    assert parse(text, None) == ParsedMessage(text, "", ())


@pytest.mark.parametrize(("tool_format", "text"), MARKED_APART)
def test_a_call_of_an_unknown_function_is_content(tool_format: str, text: str) -> None:
    message = parse(text, tool_format, tool_names=("get_time",))
    assert calls_of(message) == TWO_CALLS[1:]
    assert message.content == text[: text.rindex(next(m for m in ("<tool_call>", "[TOOL_CALLS]", TAG) if m in text))].rstrip()


@pytest.mark.parametrize(("tool_format", "text"), [entry for entry in WELL_FORMED if entry not in MARKED_APART])
def test_calls_behind_one_of_an_unknown_function_need_a_marker(tool_format: str, text: str) -> None:
    assert parse(text, tool_format, tool_names=("get_time",)) == ParsedMessage(text, "", ())


def test_arguments_alone_are_a_call() -> None:
    parser = make_parser("arguments")
    assert calls_of(join(deltas_of(parser, [" " + TIME + "\n"]))) == [("get_weather", TIME)]
    assert parser.is_complete


def test_the_id_that_the_model_wrote_is_kept() -> None:
    text = '[TOOL_CALLS]get_time[CALL_ID]a1B2c3D4e[ARGS]{}[TOOL_CALLS][{"id": "x9", "name": "get_time", "arguments": {}}]'
    assert [call.id for call in parse(text, "mistral").tool_calls] == ["a1B2c3D4e", "x9"]


def test_ids_are_made_as_the_formats_need_them() -> None:
    made = {}
    for tool_format, text in (("mistral", "[TOOL_CALLS]f{}" * 2), ("hermes", '<tool_call>{"name":"f","arguments":{}}' * 2)):
        made[tool_format] = [call.id for call in join(deltas_of(MessageParser(tool_format, None), [text])).tool_calls]
        assert len(set(made[tool_format])) == 2
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in made["mistral"])
    assert all(call_id.startswith("call_") for call_id in made["hermes"])


@pytest.mark.parametrize(
    ("written", "arguments"), [("null", "{}"), (json.dumps(TIME), TIME), (json.dumps('{"é": "\\n"}'), '{"é": "\\n"}')]
)
def test_arguments_in_another_form_are_converted(written: str, arguments: str) -> None:
    for members in (f'"name": "get_time", "arguments": {written}', f'"arguments": {written}, "name": "get_time"'):
        assert calls_of(parse(f"<tool_call>{{{members}}}</tool_call>", "hermes")) == [("get_time", arguments)]


NOT_CALLS = [
    "a<b and <tool_call",
    "<tool_call>",
    "<tool_call>\n{}</tool_call>",
    "<tool_call>nothing</tool_call> ",
    '<tool_call>{"name": "get_time"}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": "{"}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": "{} {}"}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": "[]"}</tool_call>',
    '<tool_call>{"name": "get_time", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>',
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {"a": }, "name": "get_time"}</tool_call>',
    '<tool_call>{"name": "get_time", "x": tru, "arguments": {}}</tool_call>',
    '<tool_call>{"name" "get_time"}</tool_call>',
    '<tool_call>{"name": "get_time" "arguments": {}}</tool_call>',
    '<tool_call>{"id": 3, "id": "un',
    '{"name": "get_time"}',
    '{"name": "get_time", "parameters": 5}',
    '{"name": "get_times", "parameters": {}}',
    'Here it is: {"name": "get_time", "parameters": {}}',
    "<|python_tag|>import os",
    '<|python_tag|>brave_search.call(query="x")',
    " {",
    "[TOOL_CALLS]",
    "[TOOL_CALLS] get_time",
    "[TOOL_CALLS]get_times{}",
    "[TOOL_CALLS]get_time[CALL_ID]abc[ARGS]",
    "[TOOL_CALLS]get_time[ARGS][1]",
    "[TOOL_CALLS][]",
    "[TOOL_CALLS][7]",
    '[TOOL_CALLS][{"name": "get_times", "arguments": {}}]',
    "[]",
    '[{"name": "get_times", "parameters": {}}]',
    '"text"',
    "[1, 2]",
    " \n ",
    "",
]


@pytest.mark.parametrize(
    ("text", "tool_format"),
    [
        (text, tool_format)
        for text in NOT_CALLS
        for tool_format in FORMATS
        if not (tool_format == "arguments" and text.lstrip().startswith("{"))  # an object is what this format consists of
    ],
)
def test_what_is_no_call_is_content(text: str, tool_format: str | None) -> None:
    assert parse(text, tool_format) == ParsedMessage(text, "", ())


def test_bare_json_in_the_middle_of_an_answer_is_content() -> None:
    text = 'Here it is: {"name": "get_time", "parameters": {}}'
    assert parse(text, "llama3") == ParsedMessage(text, "", ())


def test_after_something_that_is_no_call_the_next_call_is_found() -> None:
    text = '<tool_call>oh\n<tool_call>{"name": "get_times"<tool_call>{"name": "get_time", "arguments": {}}</tool_call>!'
    message = parse(text, "hermes")
    assert calls_of(message) == [("get_time", "{}")]
    assert message.content == '<tool_call>oh\n<tool_call>{"name": "get_times"!'


BROKEN = [
    ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": 1', "", '{"a": 1'),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": 1]}', "]}", '{"a": 1'),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": {}, oh</tool_call>', "oh</tool_call>", "{}"),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": {}} oh', " oh", "{}"),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": {}}\n</tool', "\n</tool", "{}"),
    ("llama3", '{"name": "get_time", "parameters": {}}; {"name": "no"}', '; {"name": "no"}', "{}"),
    ("llama3", '{"name": "get_time", "parameters": {}} ok', " ok", "{}"),
    ("mistral", '[TOOL_CALLS][{"name": "get_time", "arguments": {}}, {"name": "no"}]', ', {"name": "no"}]', "{}"),
    ("mistral", '[TOOL_CALLS][{"name": "get_time", "arguments": {}} oh', " oh", "{}"),
    ("mistral", "[TOOL_CALLS]get_time[ARGS]{x}", "x}", "{"),
    ("mistral", "[TOOL_CALLS]get_time{} and", " and", "{}"),
    ("json", '[{"name": "get_time", "parameters": {"a', "", '{"a'),
    ("json", '[{"name": "get_time", "parameters": {}}, oh]', ", oh]", "{}"),
]  # fmt: skip


@pytest.mark.parametrize(("tool_format", "text", "content", "arguments"), BROKEN)
def test_a_call_that_breaks_after_it_was_given_out_loses_nothing(
    tool_format: str, text: str, content: str, arguments: str
) -> None:
    message = parse(text, tool_format)
    assert calls_of(message) == [("get_time", arguments)]
    assert message.content == content


THINKING = [
    ("<think>\nHm.\n\nYes.\n</think>\n\nHi!", False, "Hm.\n\nYes.", "Hi!"),
    ("\n<think>\n\n</think>\n\nHi!\n", False, "", "Hi!\n"),
    ("Hm.\n</think>\nHi </think>", True, "Hm.", "Hi </think>"),
    ("<think>Hm.</think>Hi", True, "Hm.", "Hi"),
    ("<think>Hm.\n", False, "Hm.\n", ""),
    ("Hm </thin", True, "Hm </thin", ""),
    ("Hi <think>no</think>", False, "", "Hi <think>no</think>"),
    (" <thin", False, "", " <thin"),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "is_open", "reasoning", "content"), THINKING)
def test_reasoning_is_split_off(text: str, is_open: bool, reasoning: str, content: str) -> None:
    assert parse(text, None, "think", starts_in_reasoning=is_open) == ParsedMessage(content, reasoning, ())
    theirs = (
        text.replace("<think>", "[THINK]").replace("</think>", "[/THINK]").replace("<thin", "[THIN").replace("</thin", "[/THIN")
    )
    message = parse(theirs, "mistral", "mistral", starts_in_reasoning=is_open)
    assert len(message.reasoning) + len(message.content) == len(reasoning) + len(content)


def test_a_call_within_reasoning_is_reasoning() -> None:
    call = f'<tool_call>{{"name": "get_weather", "arguments": {WEATHER}}}</tool_call>'
    message = parse(f"<think>{call}</think>\n{call}", "hermes", "think")
    assert message.reasoning == call
    assert calls_of(message) == [("get_weather", WEATHER)]
    assert message.content == ""


def test_a_guided_answer_has_no_reasoning() -> None:
    message = parse(WEATHER, "arguments", "think", starts_in_reasoning=True)
    assert calls_of(message) == [("get_weather", WEATHER)]


@pytest.mark.parametrize(("tool_format", "text"), WELL_FORMED)
def test_after_the_first_call_nothing_counts_if_one_is_asked_for(tool_format: str, text: str) -> None:
    parser = make_parser(tool_format, first_call_only=True)
    deltas: list[Delta] = []
    for char in text:
        assert not parser.is_complete
        deltas.append(parser.push(char))
        if parser.is_complete:
            break
    assert parser.is_complete
    assert not parser.push(text)
    assert not parser.finish()
    assert calls_of(join(deltas)) == TWO_CALLS[:1]
    assert calls_of(parse(text, tool_format, first_call_only=True)) == TWO_CALLS[:1]


def test_calls_are_streamed_like_openai_streams_them() -> None:
    parser = make_parser("hermes")
    pieces = [
        "Ok",
        ".\n",
        "<tool",
        '_call>{"name": "get_wea',
        'ther", "argu',
        'ments": ',
        '{"city"',
        ': "Paris"',
        "}}",
        "\n</tool_call>",
    ]
    assert [parser.push(piece) for piece in pieces] == [
        Delta("Ok"),
        Delta("."),
        Delta(),
        Delta(),
        Delta(),
        Delta(),
        Delta(tool_calls=(ToolCallDelta(0, "id0", "get_weather", '{"city"'),)),
        Delta(tool_calls=(ToolCallDelta(0, None, None, ': "Paris"'),)),
        Delta(tool_calls=(ToolCallDelta(0, None, None, "}"),)),
        Delta(),
    ]
    assert parser.has_tool_calls
    assert parser.finish() == Delta()


@pytest.mark.parametrize("tool_format", ["hermes", "llama3", "mistral", None])
def test_ordinary_text_is_given_out_at_once(tool_format: str | None) -> None:
    parser = make_parser(tool_format)
    assert [parser.push(piece).content for piece in ("Well,", " a < b", " and [1]", " is {x}")] == [
        "Well,",
        " a < b",
        " and [1]",
        " is {x}",
    ]


def test_text_that_may_begin_a_marker_is_held_back() -> None:
    parser = make_parser("mistral")
    assert [parser.push(piece).content for piece in ("a [", "TOOL", "_CALL", "!")] == ["a", "", "", " [TOOL_CALL!"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MessageParser("xml", None), "'xml'"),
        (lambda: MessageParser(None, "aloud"), "'aloud'"),
        (lambda: MessageParser("arguments", None), "exactly one"),
        (lambda: MessageParser("arguments", None, tool_names=NAMES), "exactly one"),
    ],
)
def test_unknown_formats_are_refused(make: Callable[[], MessageParser], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


ORDINARY = st.text(alphabet='ab<>/{}[]":;,\\ \n|', max_size=10)
FRAGMENTS = st.sampled_from([
    *("<think>", "</think>", "<tool_call>", "</tool_call>", TAG, "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
    *('{"name": "get_time", ', '"arguments": ', '"parameters": ', '"name": "get_weather"', '{"arguments": {}, "name":'),
    *(WEATHER, TIME, "get_time", "{", "}", "[", "]", ",", ";", "\n", '"', "null", '"{}"'),
    *(text for _, text in WELL_FORMED),
])  # fmt: skip
TEXTS = st.lists(FRAGMENTS | ORDINARY, max_size=7).map("".join)


@given(TEXTS, st.sampled_from(FORMATS), st.sampled_from([None, "think", "mistral"]), st.booleans(), st.booleans(), st.data())
def test_how_a_text_is_cut_does_not_matter(
    text: str, tool_format: str | None, reasoning: str | None, is_open: bool, first: bool, data: st.DataObject
) -> None:
    options = {"starts_in_reasoning": is_open, "first_call_only": first}
    message = parse(text, tool_format, reasoning, **options)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]
    parser = make_parser(tool_format, reasoning, **options)
    deltas = deltas_of(parser, pieces)
    assert join(deltas) == message
    assert parser.has_tool_calls == bool(message.tool_calls)
    for delta in deltas:
        assert len({part.index for part in delta.tool_calls}) == len(delta.tool_calls)


@given(ORDINARY, st.sampled_from(FORMATS))
def test_ordinary_text_is_never_lost(text: str, tool_format: str | None) -> None:
    message = parse(text, tool_format)
    if not message.tool_calls:
        assert message.content == text
    else:  # the beginning of an object, in the format that consists of one
        assert tool_format == "arguments"
        read = (message.tool_calls[0].arguments + message.content).strip()
        if is_json(message.tool_calls[0].arguments):  # the answer is complete, and what follows is not read
            assert text.strip().startswith(read)
        else:
            assert read == text.strip()


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_what_follows_the_arguments_is_not_read() -> None:
    assert [(call.arguments) for call in parse("{}:", "arguments").tool_calls] == ["{}"]
    assert parse("{}:", "arguments").content == ""


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
ARGUMENTS = st.dictionaries(st.text(), JSON_VALUES, max_size=4)


def write_calls(tool_format: str, calls: list[tuple[str, str]]) -> str:
    """Write calls as a model does."""
    key = "parameters" if tool_format in {"llama3", "json"} else "arguments"
    objects = [f'{{"name": {json.dumps(name)}, "{key}": {arguments}}}' for name, arguments in calls]
    match tool_format:
        case "hermes":
            return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
        case "llama3":
            return "; ".join(objects)
        case "mistral":
            return f"[TOOL_CALLS][{', '.join(objects)}]"
        case "named":
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
    return f"[{', '.join(objects)}]"


@given(
    st.sampled_from(["hermes", "llama3", "mistral", "named", "json"]),
    st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS, st.booleans(), st.sampled_from([None, 1])), min_size=1, max_size=3),
)
def test_arguments_come_out_as_they_were_written(
    tool_format: str, wanted: list[tuple[str, dict[str, Any], bool, int | None]]
) -> None:
    calls = [
        (name, json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)) for name, arguments, ascii_only, indent in wanted
    ]
    message = parse(write_calls(tool_format, calls), "mistral" if tool_format == "named" else tool_format)
    assert calls_of(message) == calls
    assert message.content == ""
