"""Messages out of answers: which formats a request's answers have, and what makes a model call a function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medusa_runtime import MedusaError
from medusa_serve.endpoints.shared import Call
from medusa_serve.errors import ApiError
from medusa_serve.parsing import MessageParser, ParsedMessage, join, named_schema, required_schema
from medusa_serve.protocol.chat import ToolFields

WITH_SPECIAL_TOKENS = ("llama3", "mistral")  # formats whose markers are special tokens


class MessageReader:
    """Reads the answers to one request as messages.

    Args:
        call: the request.
        tools: its fields about tools.

    Raises:
        ApiError: functions are offered, and it is not known how the model writes calls.
    """

    def __init__(self, call: Call, tools: ToolFields) -> None:
        self._call, self._tools = call, tools
        formats = call.formats
        self._reasoning = formats.reasoning
        self._format = self._tool_format(formats.tools)
        self._starts_in_reasoning = False

    def _tool_format(self, written: str | None) -> str | None:
        if not self._tools.offered:
            return None
        if self._tools.chosen is not None:
            return "arguments"
        if self._tools.tool_choice == "required":
            return "json"
        if written is None:
            raise ApiError(
                400,
                "'tools' is not supported with 'tool_choice' auto: it is not known how this model writes calls; "
                "the operator can say so with --tool-format",
                param="tools",
                code="unsupported_parameter",
            )
        return written

    def options(self) -> dict[str, Any]:
        """Fields of the runtime's options: what forces a call, and what keeps its markers in the text.

        Raises:
            ApiError: a function's schema cannot be used.
        """
        chosen = self._tools.chosen
        offered = [tool.model_dump(exclude_none=True) for tool in self._tools.offered]
        try:
            if chosen is not None:
                return {"json_schema": named_schema(chosen.model_dump(exclude_none=True))}
            if self._format == "json":
                return {"json_schema": required_schema(offered, self._tools.parallel)}
        except MedusaError as error:
            raise ApiError(400, str(error), param="tools") from error
        return {"skip_special_tokens": False} if self._format in WITH_SPECIAL_TOKENS else {}

    def look_at(self, prompt_ids: Sequence[int]) -> None:
        """Find out whether a prompt has opened the reasoning."""
        self._starts_in_reasoning = self._call.reader.begins_in_reasoning(prompt_ids, self._reasoning)

    def parser(self) -> MessageParser:
        """A parser for one answer."""
        chosen = self._tools.chosen
        offered = [chosen] if chosen is not None else self._tools.offered
        return MessageParser(
            self._format,
            self._reasoning,
            tool_names=[tool.function.name for tool in offered] or None,
            starts_in_reasoning=self._starts_in_reasoning,
            first_call_only=bool(offered) and not self._tools.parallel,
        )

    def whole(self, text: str) -> ParsedMessage:
        """One whole answer."""
        parser = self.parser()
        return join([parser.push(text), parser.finish()])

    @staticmethod
    def finish_reason(reason: str, *, has_calls: bool) -> str:
        """Why a message ended."""
        return "tool_calls" if reason == "stop" and has_calls else reason
