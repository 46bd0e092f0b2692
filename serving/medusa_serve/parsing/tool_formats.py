"""The forms in which models write tool calls, one function each. Text that is no call becomes content.

- hermes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one block a call. Hermes 2 and 3, Qwen 2.5 and 3, SmolLM3.
- llama3: `{"name": …, "parameters": {…}}` from the answer's start or behind `<|python_tag|>`, joined by `;`. Llama 3.1 to 3.3.
- mistral: `[TOOL_CALLS]`, then a JSON array of calls (Mistral's tokenizers v2, v3 and v7), or
  `name[CALL_ID]id[ARGS]{…}` (v11), `name[ARGS]{…}` (v13 and later) or `name{…}`.
- json: the whole answer is a JSON array of calls. A guide makes the model write it; see `required_schema`.
- arguments: the whole answer is the arguments of the one function that is offered; see `named_schema`.

White space between calls, before the first call and behind the last one is not content.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping

from medusa_serve.parsing.calls import CallObject, Outcome, read_array
from medusa_serve.parsing.json_scanner import SPACE
from medusa_serve.parsing.output import Output
from medusa_serve.parsing.source import Reading, Source

ToolFormat = Callable[[Source, Output], Reading[None]]
_NAME = string.ascii_letters + string.digits + "_-."


def _read_hermes(source: Source, output: Output) -> Reading[None]:
    while (marker := (yield from source.until("<tool_call>", output.content))) is not None:
        source.hold()
        if (yield from CallObject(source, output).read()) is Outcome.NOT_A_CALL:
            source.rewind()
            output.content(marker)
            continue
        source.hold()
        yield from source.take_all(SPACE)
        if (yield from source.take("</tool_call>")):
            source.release()
        else:
            source.rewind()
        yield from _drop_last_space(source)


def _read_llama3(source: Source, output: Output) -> Reading[None]:
    tag = "<|python_tag|>"
    if (yield from _read_joined(source, output, tag)):
        yield from _drop_last_space(source)
    while (marker := (yield from source.until(tag, output.content))) is not None:
        if (yield from _read_joined(source, output, tag)):
            yield from _drop_last_space(source)
        else:
            output.content(marker)


def _read_joined(source: Source, output: Output, tag: str) -> Reading[bool]:
    """Read calls with semicolons between them. Returns whether there is any."""
    is_begun = False
    while True:
        source.hold()
        if is_begun:
            yield from source.take_all(SPACE + ";")
            yield from source.take(tag)
        outcome = yield from CallObject(source, output).read()
        if outcome is Outcome.NOT_A_CALL:
            source.rewind()
            return is_begun
        source.release()
        if outcome is Outcome.CUT_SHORT:
            return True
        is_begun = True


def _read_mistral(source: Source, output: Output) -> Reading[None]:
    while (marker := (yield from source.until("[TOOL_CALLS]", output.content))) is not None:
        source.hold()
        yield from source.take_all(SPACE)
        if (yield from source.take("[")):
            is_begun = (yield from read_array(source, output)) is not Outcome.NOT_A_CALL
        else:
            is_begun = yield from _read_named(source, output)
        if is_begun:
            yield from _drop_last_space(source)
        else:
            output.content(marker)


def _read_named(source: Source, output: Output) -> Reading[bool]:
    """Read a call of which the name comes first. Returns whether there is one; if not, the source is rewound."""
    name = yield from source.take_all(_NAME)
    if output.knows(name):
        call_id = ""
        if (yield from source.take("[CALL_ID]")):
            call_id = yield from source.take_all(_NAME)
        yield from source.take("[ARGS]")
        yield from source.take_all(SPACE)
        if name and (yield from source.peek()) == "{":
            source.release()
            output.begin_call(name, call_id or None)
            if (yield from source.value(output.arguments)):
                output.end_call()
            return True
    source.rewind()
    return False


def _read_json(source: Source, output: Output) -> Reading[None]:
    source.hold()
    yield from source.take_all(SPACE)
    if (yield from source.take("[")):
        if (yield from read_array(source, output)) is Outcome.COMPLETE:
            output.is_complete = True
    else:
        source.rewind()
    yield from source.to_end(output.content)


def arguments_of(name: str) -> ToolFormat:
    """The format of answers that are nothing but the arguments of a call of this function."""

    def read(source: Source, output: Output) -> Reading[None]:
        source.hold()
        yield from source.take_all(SPACE)
        if (yield from source.peek()) == "{":
            source.release()
            output.begin_call(name)
            if (yield from source.value(output.arguments)):
                output.end_call()
                output.is_complete = True
        else:
            source.rewind()
        yield from source.to_end(output.content)

    return read


def _drop_last_space(source: Source) -> Reading[None]:
    """Behind a call: read over white space if nothing else comes."""
    source.hold()
    yield from source.take_all(SPACE)
    if (yield from source.peek()):
        source.rewind()
    else:
        source.release()


READERS: Mapping[str, ToolFormat] = {
    "hermes": _read_hermes,
    "llama3": _read_llama3,
    "mistral": _read_mistral,
    "json": _read_json,
}
