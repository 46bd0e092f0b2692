"""Conversations: what a request gives to a chat template, checked and reduced to plain JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from typing_extensions import TypedDict  # pydantic reads it, and knows the one in typing from Python 3.12 on only

from medusa_runtime.errors import OptionError

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same field, the usual one first
INSTEAD_OF_CONTENT = ("tool_calls", "function_call", *REASONING)  # a message with one of these needs no content
OWN_NAMES = ("messages", "tools", "documents", "add_generation_prompt")  # these have arguments of their own


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


# Messages may have further fields, such as tool_calls, and a list of text parts as content.
Prompt = str | Sequence[Message] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """Everything a chat template sees of a request, made of JSON's own types alone. Use `of`, which checks it.

    `options` are further variables of the template, such as `enable_thinking`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    options: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @classmethod
    def of(
        cls,
        messages: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> Self:
        """Check a request's values.

        Args:
            messages: the turns, or one user message as text.
            tools: JSON schemas of functions that the model may call.
            documents: texts that the model may use, usually with `title` and `text`.
            options: further variables of the template.
            add_generation_prompt: end the prompt with what opens the assistant's turn. Omit it for yes, or for no if the
                final message is continued.
            continue_final_message: leave the final message open, so that the answer continues it.

        Raises:
            OptionError: a value cannot be used. The message names it.
        """
        if continue_final_message and add_generation_prompt:
            raise OptionError("continue_final_message and add_generation_prompt exclude each other; give one of them")
        if isinstance(messages, str):
            if continue_final_message:
                raise OptionError(
                    "continue_final_message is given with a text; it needs messages, the last one to be continued"
                )
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, Sequence) or isinstance(messages, bytes | bytearray):
            raise OptionError(f"the prompt is {messages!r:.80}; it must be text, a list of messages or a list of token ids")
        if not messages:
            raise OptionError("there are no messages; give at least one")
        options = {} if options is None else options
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise OptionError(
                f"the template options are {options!r:.80}; give them by name, such as {{'enable_thinking': False}}"
            )
        if taken := [name for name in OWN_NAMES if name in options]:
            raise OptionError(f"the template options hold {taken[0]}, which has an argument of its own; give it there")
        return cls(
            [_message(f"messages[{place}]", message) for place, message in enumerate(messages)],
            _objects("tools", tools),
            _objects("documents", documents),
            _plain("the template options", dict(options)),
            not continue_final_message if add_generation_prompt is None else bool(add_generation_prompt),
            bool(continue_final_message),
        )

    def mapped(self, change: Callable[[str], str]) -> Conversation:
        """The same with every string changed, the keys of objects included."""
        return replace(
            self,
            messages=_mapped(self.messages, change),
            tools=_mapped(self.tools, change),
            documents=_mapped(self.documents, change),
            options=_mapped(self.options, change),
        )

    def strings(self) -> Iterator[str]:
        """Every string in it, the keys of objects included."""
        yield from _strings([self.messages, self.tools, self.documents, self.options])


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise OptionError(f"{where} is {message!r:.80}; a message is an object with role and content")
    # Templates write a null as "None", and treat a missing field as they should.
    found: dict[str, Any] = {key: value for key, value in _plain(where, message).items() if value is not None}
    content = found.get("content")
    if content is None or content == []:
        found.pop("content", None)
        if not any(found.get(name) for name in INSTEAD_OF_CONTENT):
            raise OptionError(
                f"{where}, of role {found['role']!r:.40}, has no content; a message is an object with role and content"
            )
    elif isinstance(content, list):
        for part in content:
            _check_part(where, part)
    elif not isinstance(content, str):
        raise OptionError(f"{where} has the content {content!r:.80}; it must be text, or a list of text parts")
    reasoning = next((found[name] for name in REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _check_part(where: str, part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise OptionError(f"{where} has a part of type {kind!r:.40}; this model takes parts of type 'text' alone")
    if kind is None or not isinstance(part.get("text"), str):
        raise OptionError(f"{where} has the part {part!r:.80}; a part is an object with type 'text' and a text")


def _objects(name: str, values: Any) -> list[dict[str, Any]] | None:
    if not values and (values is None or isinstance(values, Sequence)):
        return None
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise OptionError(f"{name} is {values!r:.80}; it must be a list of objects")
    for place, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise OptionError(f"{name}[{place}] is {value!r:.80}; it must be an object (a dictionary)")
    return [_plain(f"{name}[{place}]", value) for place, value in enumerate(values)]


def _plain(where: str, value: Any) -> Any:
    """A copy made of JSON's own types, so that a template from elsewhere gets no object with methods that it could call."""
    try:
        return _copied(where, value)
    except RecursionError:
        raise OptionError(f"{where} is nested too deeply for a chat template") from None


def _copied(where: str, value: Any) -> Any:
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)  # the text of an enum's member, too
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            if stray := [key for key in value if not isinstance(key, str)]:
                raise OptionError(f"{where} has the key {stray[0]!r:.40}; keys must be text")
            return {str.__str__(key): _copied(where, item) for key, item in value.items()}
        case list() | tuple():
            return [_copied(where, item) for item in value]
    raise OptionError(f"{where} holds {value!r:.80}, of type {type(value).__name__}; it may hold JSON alone")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    match value:
        case str():
            return change(value)
        case dict():
            return {change(key): _mapped(item, change) for key, item in value.items()}
        case list():
            return [_mapped(item, change) for item in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from value
            yield from _strings(list(value.values()))
        case list():
            for item in value:
                yield from _strings(item)
