"""`MessageParser`: the text of one answer in, the parts of a message out."""

from __future__ import annotations

from collections.abc import Callable, Collection

from medusa_serve.parsing.deltas import Delta
from medusa_serve.parsing.output import Output, long_id, short_id
from medusa_serve.parsing.reasoning import MARKERS, read_reasoning
from medusa_serve.parsing.source import Reading, Source
from medusa_serve.parsing.tool_formats import READERS, ToolFormat, arguments_of

TOOL_FORMATS = ("hermes", "llama3", "mistral", "json", "arguments")
REASONING_FORMATS = tuple(MARKERS)
_WHOLE = ("json", "arguments")  # formats in which a guide sets the form of the whole answer


class MessageParser:
    """Splits one answer into reasoning, content and tool calls while its text comes.

    The parts do not depend on how the text is cut into pieces. Text is held back while it may be the beginning of a marker
    or of a call. A call is given out once its name and the start of its arguments are known. Text that began like a call and
    is none becomes content. If a call stops being JSON after it was given out, the rest of the text becomes content.

    Args:
        tool_format: one of `TOOL_FORMATS`; None if no functions are offered, so nothing is a call.
        reasoning_format: one of `REASONING_FORMATS`; None if the model does not think. It has no effect with the tool formats
            json and arguments, where a guide leaves no room for reasoning.
        tool_names: the functions that are offered; a call of another one is content. None takes every name. The tool format
            arguments needs exactly one.
        starts_in_reasoning: the prompt has opened the reasoning, see `begins_in_reasoning`.
        first_call_only: the answer is complete after its first call.
        new_id: makes the ids of calls; None for random ids.

    Raises:
        ValueError: a format is unknown, or the names do not fit it.
    """

    def __init__(
        self,
        tool_format: str | None,
        reasoning_format: str | None,
        *,
        tool_names: Collection[str] | None = None,
        starts_in_reasoning: bool = False,
        first_call_only: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        if reasoning_format is not None and reasoning_format not in MARKERS:
            raise ValueError(f"the reasoning format is {reasoning_format!r}; it must be one of {', '.join(MARKERS)}")
        reader = _reader(tool_format, tool_names)
        self._source = Source()
        self._output = Output(
            tool_names, new_id or (short_id if tool_format == "mistral" else long_id), first_call_only=first_call_only
        )
        markers = MARKERS[reasoning_format] if reasoning_format is not None and tool_format not in _WHOLE else None
        self._reading = self._read(reader, markers, is_open=starts_in_reasoning)

    @property
    def has_tool_calls(self) -> bool:
        """Whether a call was given out."""
        return self._output.num_calls > 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing that comes now counts, so that the answer can be ended."""
        return self._output.is_complete

    def push(self, text: str) -> Delta:
        """Take the next piece of the answer's text. Returns what is certain now."""
        if text and not self.is_complete:
            self._source.add(text)
            self._go_on()
        return self._output.take()

    def finish(self) -> Delta:
        """The text has ended. Returns what was held back."""
        if not self.is_complete:
            self._source.has_ended = True
            self._go_on()
        return self._output.take()

    def _go_on(self) -> None:
        """Run the parser until it needs more text."""
        next(self._reading, None)

    def _read(self, reader: ToolFormat | None, markers: tuple[str, str] | None, *, is_open: bool) -> Reading[None]:
        if markers is not None:
            yield from read_reasoning(self._source, self._output, markers, is_open=is_open)
        if reader is None:
            yield from self._source.to_end(self._output.content)
        else:
            yield from reader(self._source, self._output)


def _reader(tool_format: str | None, tool_names: Collection[str] | None) -> ToolFormat | None:
    if tool_format == "arguments":
        if tool_names is None or len(tool_names) != 1:
            raise ValueError(f"the tool names are {tool_names}; the tool format arguments needs exactly one")
        return arguments_of(next(iter(tool_names)))
    if tool_format is not None and tool_format not in READERS:
        raise ValueError(f"the tool format is {tool_format!r}; it must be one of {', '.join(TOOL_FORMATS)}")
    return READERS[tool_format] if tool_format is not None else None
