"""Collects what a parser finds, until it is given out as a delta."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection

from medusa_serve.parsing.deltas import Delta, ToolCallDelta


class Output:
    """What was found and not given out yet.

    Args:
        tool_names: the functions that may be called; None for all.
        new_id: makes the id of a call that has none in the text.
        first_call_only: drop all that comes after the first whole call.
    """

    def __init__(self, tool_names: Collection[str] | None, new_id: Callable[[], str], *, first_call_only: bool) -> None:
        self._tool_names = tool_names
        self._new_id = new_id
        self._first_call_only = first_call_only
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, ToolCallDelta] = {}  # by index
        self.num_calls = 0
        self.is_complete = False  # nothing that comes after this counts

    def knows(self, name: str) -> bool:
        """Whether a function of this name may be called."""
        return self._tool_names is None or name in self._tool_names

    def content(self, text: str) -> None:
        """Add ordinary text."""
        if not self.is_complete:
            self._content.append(text)

    def reasoning(self, text: str) -> None:
        """Add text of the reasoning."""
        self._reasoning.append(text)

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        """Begin a tool call."""
        if self.is_complete:
            return
        self._calls[self.num_calls] = ToolCallDelta(self.num_calls, call_id or self._new_id(), name, "")
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that was begun last."""
        if self.is_complete or not text:
            return
        index = self.num_calls - 1
        before = self._calls.get(index, ToolCallDelta(index, None, None, ""))
        self._calls[index] = ToolCallDelta(index, before.id, before.name, before.arguments + text)

    def end_call(self) -> None:
        """The last call's arguments are whole."""
        if self._first_call_only:
            self.is_complete = True

    def take(self) -> Delta:
        """What came since the last time."""
        delta = Delta("".join(self._content), "".join(self._reasoning), tuple(self._calls.values()))
        self._content, self._reasoning, self._calls = [], [], {}
        return delta


def long_id() -> str:
    """An id such as OpenAI's."""
    return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    """An id of nine letters and digits, as Mistral's templates require it."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
