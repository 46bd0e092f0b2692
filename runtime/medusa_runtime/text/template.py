"""A checkpoint's chat templates: messages in, the prompt's text out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from medusa_runtime.errors import BundleError, OptionError, first_line
from medusa_runtime.text.conversation import Conversation

DEFAULT = "default"
FOR_TOOLS = "tool_use"  # used for a request with tools, if the checkpoint has one of this name
PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning of their own


class ChatTemplate:
    """The chat templates of a checkpoint, its special tokens, and the environment that runs them.

    Templates are programs that come with a checkpoint and are not trusted: they run in Jinja's sandbox, and they see copies of
    a request's values. Filters and functions are those that Transformers gives them.

    Args:
        templates: their sources, by name. Most checkpoints have one, called default, or none.
        special_tokens: variables of each template, such as `bos_token`.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.sources = dict(templates)
        self.special_tokens = dict(special_tokens)
        self._compiled: dict[str, tuple[jinja2.Template, frozenset[str]]] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> ChatTemplate:
        """Read a bundle's `chat.json`.

        Raises:
            BundleError: it is missing or damaged.
        """
        try:
            chat = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{path} cannot be read ({first_line(error)}); export the bundle again") from error
        chat = chat if isinstance(chat, dict) else {}
        template, others, special_tokens = chat.get("template"), chat.get("templates", {}), chat.get("special_tokens")
        if not (isinstance(template, str | None) and _all_text(others) and _all_text(special_tokens)):
            raise BundleError(f"{path} has no template and special tokens; export the bundle again")
        return cls(({DEFAULT: template} if template else {}) | others, special_tokens or {})

    def save(self, path: str | Path) -> None:
        """Write `chat.json`."""
        others = {name: source for name, source in self.sources.items() if name != DEFAULT}
        chat = {"template": self.sources.get(DEFAULT), "special_tokens": self.special_tokens}
        text = json.dumps(chat | ({"templates": others} if others else {}), indent=2, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @property
    def default(self) -> str | None:
        """The name of the template that is used if a request names none: the one called default, or an only one."""
        return DEFAULT if DEFAULT in self.sources else next(iter(self.sources)) if len(self.sources) == 1 else None

    def check(self) -> None:
        """Compile all templates.

        Raises:
            BundleError: one of them is not valid Jinja.
        """
        for name in self.sources:
            self._template(name)

    def render(self, conversation: Conversation, name: str | None = None) -> str:
        """The prompt's text.

        Args:
            conversation: what the template sees.
            name: which template. Omit it for the default one, or for the one called tool_use if there are tools.

        Raises:
            OptionError: there is no such template, or it refuses the conversation.
            BundleError: the template is not valid Jinja.
        """
        name = self.chosen(conversation, name)
        return self.rendered(name, self.prepared(name, conversation))

    def chosen(self, conversation: Conversation, name: str | None) -> str:
        """The name of the template for a conversation; see `render`."""
        if not self.sources:
            raise OptionError("this model has no chat template; give the prompt as text")
        if name is None and conversation.tools and FOR_TOOLS in self.sources:
            return FOR_TOOLS
        found = self.default if name is None else name
        known = ", ".join(sorted(self.sources))
        if found is None:
            raise OptionError(f"this model has several chat templates and none called default; name one of: {known}")
        if found not in self.sources:
            raise OptionError(f"there is no chat template {found!r:.40}; this model has: {known}")
        return found

    def prepared(self, name: str, conversation: Conversation) -> Conversation:
        """The conversation in the form that a template reads: lists of text parts become text if it reads no lists.

        Raises:
            OptionError: the template does not read the tools, the documents or an option.
        """
        _, variables = self._template(name)
        asked = [what for what in ("tools", "documents") if getattr(conversation, what)]
        if unread := [what for what in asked if what not in variables]:
            raise OptionError(f"{unread[0]} are given, but the chat template {name} does not use them; leave them out")
        if unread := [option for option in conversation.options or {} if option not in variables | self.special_tokens.keys()]:
            raise OptionError(f"the chat template {name} has no option {unread[0]!r:.40}; leave it out")
        lists = [place for place, message in enumerate(conversation.messages) if isinstance(message.get("content"), list)]
        joined = set(lists) - self._read_as_lists(name, conversation, lists)
        return replace(
            conversation,
            messages=[
                {**message, "content": " ".join(part["text"] for part in message["content"])} if place in joined else message
                for place, message in enumerate(conversation.messages)
            ],
        )

    def rendered(self, name: str, conversation: Conversation) -> str:
        """The text of a conversation that is `prepared`."""
        if not conversation.continue_final_message:
            return self._run(name, conversation)
        [mark] = self.unused([*conversation.strings(), *self.sources.values()], 1)
        text, _, after = self._run(name, _with_mark(conversation, mark + " ")).rpartition(mark)
        text = text.replace(mark + " ", "").replace(mark, "")  # of a template that writes the message more than once
        written = _final_text(conversation.messages[-1])
        if not text or written.strip() not in text:
            raise OptionError(
                "continue_final_message is given, but the chat template does not write the final message as it is"
            )
        # A template that trims contents would have trimmed the final one's end, too, but for the mark.
        return text if after.startswith(" ") else text.rstrip()

    def literals(self) -> list[str]:
        """All texts that the templates themselves may write."""
        texts = set()
        for name in self.sources:
            template, _ = self._template(name)
            tree = template.environment.parse(self.sources[name])
            texts |= {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
            texts |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        return sorted(texts)

    @staticmethod
    def unused(texts: Iterable[str], count: int) -> list[str]:
        """Private-use characters that stand in none of the texts, neither as they are nor escaped."""
        whole = "\0".join(texts)
        lowered = whole.lower()
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in whole and f"{code:x}" not in lowered)
        found = [mark for mark, _ in zip(free, range(count), strict=False)]
        if len(found) < count:
            raise OptionError("the messages use every private-use character of Unicode; leave some out")
        return found

    def _read_as_lists(self, name: str, conversation: Conversation, places: Sequence[int]) -> set[int]:
        """Which of the messages that have lists of parts a template reads as such.

        Nothing says so in advance, so it is tried: a template that reads a list writes its texts, and no other field of it.
        """
        if not places:
            return set()
        text, field = self.unused([*conversation.strings(), *self.sources.values()], 2)
        tried = [dict(message) for message in conversation.messages]
        for place in places:
            count = len(tried[place]["content"])
            tried[place]["content"] = [
                {"type": "text", "text": f"{text}{place}.{part}{text}", f"{field}{place}{field}": ""} for part in range(count)
            ]
        try:
            found = self._run(name, replace(conversation, messages=tried, continue_final_message=False))
        except OptionError:
            return set()
        return {
            place
            for place in places
            if all(f"{text}{place}.{part}{text}" in found for part in range(len(tried[place]["content"])))
            and f"{field}{place}{field}" not in found
        }

    def _run(self, name: str, conversation: Conversation) -> str:
        template, _ = self._template(name)
        try:
            return template.render(
                self.special_tokens | (conversation.options or {}),
                messages=conversation.messages,
                tools=conversation.tools,
                documents=conversation.documents,
                add_generation_prompt=conversation.add_generation_prompt,
            )
        except Exception as error:  # the template is a program from elsewhere: it may fail in any way
            raise OptionError(f"the chat template refuses these messages: {first_line(error)}") from error

    def _template(self, name: str) -> tuple[jinja2.Template, frozenset[str]]:
        """A template, compiled at its first use, and the variables that it reads."""
        if name not in self._compiled:
            environment = _environment()
            try:
                variables = jinja2.meta.find_undeclared_variables(environment.parse(self.sources[name]))
                self._compiled[name] = environment.from_string(self.sources[name]), frozenset(variables)
            except jinja2.TemplateSyntaxError as error:
                raise BundleError(
                    f"the chat template {name} is not valid Jinja (line {error.lineno}: {first_line(error)}); "
                    "correct it in the checkpoint and export again"
                ) from error
            except Exception as error:
                raise BundleError(f"the chat template {name} cannot be compiled ({first_line(error)})") from error
        return self._compiled[name]


def _all_text(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())


def _final_text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        raise OptionError("continue_final_message is given, but the final message has no content to continue")
    return str(content if isinstance(content, str) else content[-1]["text"])


def _with_mark(conversation: Conversation, mark: str) -> Conversation:
    """The conversation with a mark behind the final message's text."""
    final = dict(conversation.messages[-1])
    text = _final_text(final) + mark
    content = final["content"]
    final["content"] = text if isinstance(content, str) else [*content[:-1], {**content[-1], "text": text}]
    return replace(conversation, messages=[*conversation.messages[:-1], final])


# The environment: what Transformers gives templates


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "dict": _Dictionaries(),
        "namespace": _Namespace,
    }
    return environment


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``: marks the assistant's words for training. Here it only passes them on."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own, it does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:  # noqa: A002 - templates may name it
    return datetime.now().strftime(format)  # noqa: DTZ005 - local time, without a zone, is what templates expect


class _Dictionaries:
    """`dict`, as a function alone: templates cannot reach the class."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **fields: Any) -> None:  # so that a field may be called self
        self, *rest = args
        values = dict(*rest, **fields)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no field {name!r}: it begins with an underscore")
