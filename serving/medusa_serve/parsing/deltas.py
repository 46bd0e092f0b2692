"""What a parser gives out: parts of a message as they become certain, and the whole message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ToolCallDelta:
    """A part of one tool call, as OpenAI's API streams it."""

    index: int  # which of the answer's calls
    id: str | None  # in the call's first delta alone
    name: str | None  # in the call's first delta alone
    arguments: str  # the next piece of the arguments' JSON text


@dataclass(frozen=True)
class Delta:
    """What a piece of text added to a message. It has at most one delta of each tool call."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        """Whether it adds anything."""
        return bool(self.content or self.reasoning or self.tool_calls)


@dataclass(frozen=True)
class ToolCall:
    """A whole tool call."""

    id: str
    name: str
    arguments: str  # JSON text of an object, unless the answer ended before the object did


@dataclass(frozen=True)
class ParsedMessage:
    """A whole message."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]


def join(deltas: Iterable[Delta]) -> ParsedMessage:
    """The message that deltas make together, given in their order."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for delta in deltas:
        content.append(delta.content)
        reasoning.append(delta.reasoning)
        for part in delta.tool_calls:
            if part.id is not None and part.name is not None:
                calls.append(ToolCall(part.id, part.name, part.arguments))
            else:
                call = calls[part.index]
                calls[part.index] = replace(call, arguments=call.arguments + part.arguments)
    return ParsedMessage("".join(content), "".join(reasoning), tuple(calls))
