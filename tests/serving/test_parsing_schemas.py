"""The schemas that make a model call functions say what they should, and the runtime's grammars take them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from medusa_runtime import OptionError
from medusa_serve.parsing import named_schema, required_schema

PLACE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "at": {"$ref": "#/$defs/Point"},
        "$ref": {"type": "string", "const": {"$ref": "#/no/reference"}},
        "near": {"type": "array", "items": [{"$ref": "#"}]},
    },
    "required": ["at"],
    "additionalProperties": False,
    "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_time", "description": "The time."}},
    {"type": "function", "function": {"name": "go", "parameters": PLACE}},
]


def tool(name: object, parameters: object = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_a_required_call_is_one_of_the_functions() -> None:
    schema = required_schema(TOOLS, parallel=True)
    assert schema["type"] == "array"
    assert schema["minItems"] == 1
    assert "maxItems" not in schema
    time, go = schema["items"]["anyOf"]
    assert list(time["properties"]) == ["name", "parameters"]  # in this order a call can be streamed
    assert time["properties"]["name"] == {"const": "get_time"}
    assert time["properties"]["parameters"] == {"type": "object", "properties": {}, "additionalProperties": False}
    assert time["required"] == ["name", "parameters"]
    assert go["properties"]["name"] == {"const": "go"}


def test_without_parallel_calls_there_is_exactly_one() -> None:
    schema = required_schema(TOOLS, parallel=False)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)


def test_references_to_the_root_follow_it() -> None:
    parameters = required_schema(TOOLS, parallel=True)["items"]["anyOf"][1]["properties"]["parameters"]
    pointer = "#/items/anyOf/1/properties/parameters"
    assert parameters["properties"]["at"] == {"$ref": f"{pointer}/$defs/Point"}
    assert parameters["properties"]["near"]["items"] == [{"$ref": pointer}]
    assert parameters["properties"]["$ref"] == PLACE["properties"]["$ref"]  # a property of this name, and data
    assert "$schema" not in parameters
    assert TOOLS[1]["function"]["parameters"] is PLACE
    assert PLACE["properties"]["at"] == {"$ref": "#/$defs/Point"}


def test_a_named_call_has_the_functions_own_schema() -> None:
    assert named_schema(TOOLS[1]) == {key: value for key, value in PLACE.items() if key != "$schema"}
    assert named_schema({"type": "function", "name": "flat", "parameters": {}}) == {"type": "object"}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([tool(None)], "the name None"),
        ([tool("")], "the name ''"),
        ([{"type": "function", "function": 3}], "the name None"),
        ([tool("f"), tool("f")], "two functions of the name 'f'"),
        ([tool("f", {"type": "array"})], "the type 'array'; it must be 'object'"),
        ([tool("f", [1])], r"the type \[1\]; it must be 'object'"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(tools: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        required_schema(tools, parallel=True)


def accepts(schema: dict[str, Any], text: str) -> bool:
    """Whether llguidance, with which the runtime guides answers, takes a text as a whole answer."""
    llguidance = pytest.importorskip("llguidance")
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ('[{"name": "get_time", "parameters": {}}]', True),
        ('[{"name": "go", "parameters": {"at": {"x": 3}}}]', True),
        ('[{"name": "get_time", "parameters": {}}, {"name": "go", "parameters": {"at": {"x": 3}}}]', True),
        ('[{"name": "get_time", "parameters": {"at": 1}}]', False),
        ('[{"name": "go", "parameters": {"at": {"x": "3"}}}]', False),
        ('[{"name": "stop", "parameters": {}}]', False),
        ("[]", False),
    ],
)
def test_the_guide_allows_calls_and_nothing_else(text: str, is_allowed: bool) -> None:
    tools = [TOOLS[0], tool("go", {key: PLACE[key] for key in ("type", "required", "additionalProperties", "$defs")})]
    tools[1]["function"]["parameters"]["properties"] = {"at": {"$ref": "#/$defs/Point"}}
    assert accepts(required_schema(tools, parallel=True), text) is is_allowed
    if is_allowed:
        assert accepts(required_schema(tools, parallel=False), text) is (text.count("name") == 1)
