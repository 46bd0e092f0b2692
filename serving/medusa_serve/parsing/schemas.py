"""JSON schemas that make a model call functions: the server gives them to the runtime as a guide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medusa_runtime import OptionError

# Keywords of JSON Schema by what they hold.
_SCHEMAS_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_DATA = {"const", "enum", "default", "examples"}
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def required_schema(tools: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """The schema of an array of calls, for answers that have to call a function. The tool format json reads them.

    Args:
        tools: the functions, as in OpenAI's chat completions.
        parallel: whether there may be several calls.

    Raises:
        OptionError: a function has no name, two have the same, or a function's parameters are no object.
    """
    names = [_name(tool) for tool in tools]
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise OptionError(f"tools holds two functions of the name {twice!r}; names must differ")
    calls = [_call_schema(tool, f"#/items/anyOf/{place}/properties/parameters") for place, tool in enumerate(tools)]
    schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
    return schema if parallel else schema | {"maxItems": 1}


def named_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, for answers that have to call it. The tool format arguments reads them.

    Raises:
        OptionError: the function has no name, or its parameters are no object.
    """
    return _parameters(tool)


def _call_schema(tool: Mapping[str, Any], pointer: str) -> dict[str, Any]:
    parameters = _with_references_below(_parameters(tool), pointer)
    return {
        "type": "object",
        "properties": {"name": {"const": _name(tool)}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else tool


def _name(tool: Mapping[str, Any]) -> str:
    name = _function(tool).get("name")
    if not isinstance(name, str) or not name:
        raise OptionError(f"a function of tools has the name {name!r}; give it a text")
    return name


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's parameters; that of an empty object if it has none."""
    schema = _function(tool).get("parameters")
    if schema is None:
        return dict(_NO_PARAMETERS)
    kind = schema.get("type", "object") if isinstance(schema, Mapping) else None
    if not isinstance(schema, Mapping) or kind != "object":
        found = repr(schema if kind is None else kind)
        raise OptionError(f"the parameters of the function {_name(tool)!r} have the type {found:.80}; it must be 'object'")
    return {"type": "object"} | {key: value for key, value in schema.items() if key not in {"$schema", "$id"}}


def _with_references_below(schema: Any, pointer: str) -> Any:
    """A schema that becomes a part of another one, at `pointer`: references to its root are made to point there."""
    if isinstance(schema, list):
        return [_with_references_below(part, pointer) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    changed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _DATA:
            changed[key] = value
        elif key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            changed[key] = {name: _with_references_below(part, pointer) for name, part in value.items()}
        elif key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            changed[key] = pointer + value[1:]
        else:
            changed[key] = _with_references_below(value, pointer)
    return changed
