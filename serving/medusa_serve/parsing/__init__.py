"""Turns the text of an answer, as it comes, into reasoning, content and tool calls.

`MessageParser` does it. `detect` guesses the formats that a model writes from its chat template. `required_schema` and
`named_schema` are the JSON schemas that make a model call a function.
"""

from medusa_serve.parsing.deltas import Delta, ParsedMessage, ToolCall, ToolCallDelta, join
from medusa_serve.parsing.detect import begins_in_reasoning, detect
from medusa_serve.parsing.message import REASONING_FORMATS, TOOL_FORMATS, MessageParser
from medusa_serve.parsing.schemas import named_schema, required_schema

__all__ = [
    "REASONING_FORMATS",
    "TOOL_FORMATS",
    "Delta",
    "MessageParser",
    "ParsedMessage",
    "ToolCall",
    "ToolCallDelta",
    "begins_in_reasoning",
    "detect",
    "join",
    "named_schema",
    "required_schema",
]
