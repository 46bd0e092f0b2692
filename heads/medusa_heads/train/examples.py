"""Training examples: conversations as token ids, split into prompt and answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_heads.distill.store import FACTS_NAME, read_facts, read_rows
from medusa_heads.tokens import CheckpointCodec
from medusa_runtime.errors import OptionError

ALIKE_ROWS = 8  # rows to check if a file does not name its tokenizer: their token ids must decode to their messages


@dataclass(frozen=True)
class Example:
    """One answer with its prompt."""

    key: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # [R], R ≥ 1
    opening: str = ""  # the user's first message, which all turns of a conversation share
    source: str = ""  # where the prompt comes from

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompt and answer together."""
        return len(self.prompt_ids) + len(self.response_ids)


def read_examples(paths: Sequence[str | Path], codec: CheckpointCodec, *, max_length: int) -> list[Example]:
    """Read training data: directories of `medusa-export distill`, or files of JSON lines.

    A line has `messages`, the last one by the assistant: only that answer is learned. It can also have `response_token_ids`
    (the answer's ids) and `prompt_token_ids`. Missing ids are made with the tokenizer and its chat template.

    Args:
        paths: directories and files, read in this order.
        codec: the model's tokenizer.
        max_length: longest conversation in tokens. Longer answers are cut; an example without an answer left is dropped.

    Raises:
        OptionError: a path does not exist, a row is damaged (the message gives its number), the data was made with another
        tokenizer, or there are no answers.
    """
    examples = []
    for path in map(Path, paths):
        if not path.exists():
            raise OptionError(f"there is no data at {path}; make some with: medusa-export distill")
        found = _from_directory(path, codec) if path.is_dir() else _from_file(path, codec)
        for example in found:
            room = max_length - len(example.prompt_ids)
            if example.prompt_ids and example.response_ids and room > 0:
                examples.append(dataclasses.replace(example, response_ids=example.response_ids[:room]))
    if not examples:
        raise OptionError(
            f"there are no answers to learn from in {', '.join(map(str, paths))}; make some with: medusa-export distill"
        )
    return examples


def split(examples: Sequence[Example], held_out: float) -> tuple[list[Example], list[Example]]:
    """Split examples into those to train on and those held out. It depends only on the user's first message."""
    training: list[Example] = []
    kept: list[Example] = []
    for example in examples:
        place = zlib.crc32((example.opening or repr(example.prompt_ids)).encode()) / 2**32
        (kept if place < held_out else training).append(example)
    return training, kept


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 over examples in their order."""
    whole = hashlib.sha256()
    for example in examples:
        whole.update(repr((example.prompt_ids, example.response_ids)).encode())
    return whole.hexdigest()


def _from_directory(path: Path, codec: CheckpointCodec) -> Iterator[Example]:
    if not (path / FACTS_NAME).is_file():
        raise OptionError(f"{path} is not data of `medusa-export distill`: it has no {FACTS_NAME}; give its output directory")
    if read_facts(path).settings.tokenizer != codec.digest:
        raise OptionError(f"{path} was made with another tokenizer; distil it again with this model")
    for row in read_rows(path):
        opening = _opening(row.messages)
        yield Example(row.key, tuple(row.prompt_token_ids), tuple(row.response_token_ids), opening, row.source)


def _from_file(path: Path, codec: CheckpointCodec) -> Iterator[Example]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, row {number}"
            yield _example(_parse(line, where), where, f"{path.stem}-{number}", codec, check=number <= ALIKE_ROWS)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # or a number with too many digits
        raise OptionError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise OptionError(f"{where} is not a JSON object")
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(message, dict) for message in messages):
        raise OptionError(f"{where} has no list of messages that ends with an answer")
    if messages[-1].get("role") != "assistant" or not isinstance(messages[-1].get("content"), str):
        raise OptionError(f"{where}: the last message must be an answer of the assistant")
    return row


def _example(row: dict[str, Any], where: str, key: str, codec: CheckpointCodec, *, check: bool) -> Example:
    messages, limit = row["messages"], codec.vocab_size
    try:
        prompt_ids = row.get("prompt_token_ids") or codec.encode(messages[:-1])
        response_ids = row.get("response_token_ids") or codec.answer_ids(messages)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error
    for name, ids in (("prompt_token_ids", prompt_ids), ("response_token_ids", response_ids)):
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < limit for token in ids):
            raise OptionError(f"{where}: {name} must be a list of token ids below {limit}")
    if check and "response_token_ids" in row and codec.decode(response_ids).strip() != messages[-1]["content"].strip():
        raise OptionError(
            f"{where}: the token ids do not decode to the answer, so another tokenizer made them; distil with this model"
        )
    return Example(key, tuple(prompt_ids), tuple(response_ids), _opening(messages), str(row.get("source") or ""))


def _opening(messages: Sequence[Any]) -> str:
    return next((str(message.get("content")) for message in messages if message.get("role") == "user"), "")
