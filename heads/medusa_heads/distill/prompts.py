"""The prompts to answer: reads them from files, checks each row, selects and shuffles them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from medusa_runtime.errors import OptionError, first_line
from medusa_runtime.text.codec import Message

ROLES = frozenset({"system", "user", "assistant", "tool"})
FORMS = '{"prompt": "…"}, {"turns": ["…", …]} or {"messages": [{"role": "user", "content": "…"}, …]}'


@dataclass(frozen=True)
class Conversation:
    """One conversation for the model to answer. Answers in the file are ignored, as the model gives its own."""

    key: str  # unique within a run, and the same in every run
    # the messages before each of the model's answers; empty: the model writes the prompt
    turns: tuple[tuple[Message, ...], ...]
    source: str = ""
    start: str = ""  # the first words of a prompt that the model writes
    own_turns: int = 1  # the user's turns, if the model writes them


def read_prompts(path: str | Path) -> list[Conversation]:
    """Read conversations from JSON lines, or prompts from a text file with one per line.

    A row has one of `FORMS`, with an optional `source`. The assistant's turns are replaced by the model's own answers.

    Raises:
        OptionError: the file cannot be read, is empty, or has a bad row; the message gives the row's number.
    """
    path = Path(path)
    lines = _read_text(path).split("\n")  # not splitlines: JSON strings may contain other separators
    as_json = path.suffix.lower() in {".jsonl", ".json"}
    stem = path.stem.encode(errors="replace").decode()  # a file's name may not be valid text
    conversations = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, row {number}"
            row = _parse(line, where) if as_json else {"prompt": line.strip()}
            conversations.append(Conversation(f"{stem}-{number}", _turns(row, where), _text(row, "source", where, "")))
    if not conversations:
        raise OptionError(f"{path} has no prompts; a row is {FORMS}, or a line of text")
    return conversations


def read_starts(path: str | Path) -> list[str]:
    """Read the first words of prompts from a text file with one per line. Empty lines and lines that begin with # are left out.

    Raises:
        OptionError: the file cannot be read, or has no line that counts.
    """
    starts = [line.strip() for line in _read_text(Path(path)).split("\n")]
    starts = [line for line in starts if line and not line.startswith("#")]
    if not starts:
        raise OptionError(f"{path} has no first words of prompts; each is a line of text")
    return starts


def self_prompted(count: int, *, starts: Sequence[str] = (), turns: int = 1, seed: int = 0) -> list[Conversation]:
    """Conversations in which the model also writes the user's turns.

    Given its chat template up to the user's words, an instruction-tuned model continues with a question like those that it was
    tuned on. Source: Xu et al., "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing". A base
    model writes the beginning of a text. Given first words, the model goes on with them, so they decide which kinds of prompts
    there are.

    Args:
        count: number of conversations.
        starts: the first words of the prompts. All are used equally often.
        turns: the user's turns in each conversation. Those after the first have no first words.
        seed: the seed of the order of `starts`.
    """
    ordered = list(starts) or [""]
    random.Random(seed).shuffle(ordered)  # noqa: S311 - not used for security
    return [Conversation(f"self-{index}", (), "self", ordered[index % len(ordered)], turns) for index in range(count)]


def only_text(messages: Sequence[Message]) -> str:
    """The text of the only message of a prompt.

    Raises:
        OptionError: there are several, or it is not a user's.
    """
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise OptionError(
            "this model has no chat template, so a prompt is one text, without a system message and without further turns"
        )
    text: str = messages[0]["content"]
    return text


def select(
    conversations: Sequence[Conversation], *, mix: Mapping[str, int] | None = None, limit: int | None = None, seed: int = 0
) -> list[Conversation]:
    """A random selection in random order. It is the same for the same arguments.

    Args:
        conversations: the conversations to select from.
        mix: the most conversations from each source. Names may contain ``*``; the first matching name counts, and sources that
        match no name are dropped. None keeps all.
        limit: the most conversations in total.
        seed: the seed of selection and order.

    Raises:
        OptionError: nothing is left, or a name in the mix matches no source.
    """
    shuffled = list(conversations)
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - not used for security
    if mix:
        left = dict.fromkeys({c.source for c in conversations}, 0)
        for pattern in reversed(list(mix)):
            fitting = [source for source in left if fnmatchcase(source, pattern)]
            if not fitting:
                raise OptionError(
                    f"no prompt has the source {pattern!r}; the sources are: {', '.join(sorted(filter(None, left))) or 'none'}"
                )
            left |= dict.fromkeys(fitting, mix[pattern])
        kept = []
        for conversation in shuffled:
            if left[conversation.source] > 0:
                left[conversation.source] -= 1
                kept.append(conversation)
        shuffled = kept
    chosen = shuffled[:limit]
    if not chosen:
        raise OptionError("--mix and --limit leave no prompts; change them")
    return chosen


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number with too many digits
        raise OptionError(f"{where} is not JSON ({first_line(error)}); a row is {FORMS}, on one line") from error
    if not isinstance(row, dict):
        raise OptionError(f"{where} is not an object; a row is {FORMS}")
    return row


def _turns(row: dict[str, Any], where: str) -> tuple[tuple[Message, ...], ...]:
    """The messages before each answer."""
    if "messages" in row:
        return _from_messages(row["messages"], where)
    texts = [row["prompt"]] if "prompt" in row else row.get("turns")
    if not isinstance(texts, list) or not texts:
        raise OptionError(f"{where} has no prompt; a row is {FORMS}")
    return tuple((_message("user", text, where),) for text in texts)


def _from_messages(messages: Any, where: str) -> tuple[tuple[Message, ...], ...]:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise OptionError(f"{where}: messages must be a list of objects with role and content")
    turns: list[tuple[Message, ...]] = []
    said: list[Message] = []
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise OptionError(f"{where}: the role is {role!r:.80}; it must be one of {', '.join(sorted(ROLES))}")
        if role != "assistant":
            said.append(_message(role, message.get("content"), where))
        elif any(before["role"] != "system" for before in said):  # otherwise there is no question yet
            turns.append(tuple(said))
            said = []
    if any(before["role"] != "system" for before in said):
        turns.append(tuple(said))
    if not any(message["role"] == "user" for turn in turns for message in turn):
        raise OptionError(f"{where}: there is no message of a user")
    return tuple(turns)


def _message(role: str, content: Any, where: str) -> Message:
    if not isinstance(content, str) or not content.strip() or not _is_unicode(content):
        raise OptionError(f"{where}: a {role}'s turn is {content!r:.80}; it must be text")
    return {"role": role, "content": content}


def _text(row: dict[str, Any], name: str, where: str, default: str) -> str:
    value = row.get(name, default)
    if not isinstance(value, str) or not _is_unicode(value):
        raise OptionError(f"{where}: {name} is {value!r:.80}; it must be text")
    return value


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which JSON can contain but tokenizers cannot read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
