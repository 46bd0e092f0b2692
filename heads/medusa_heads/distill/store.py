"""Training data on disk: a directory with the answers, one JSON line each, and the settings that they were made with.

Each answer is appended at once, so an interrupted run loses at most the line that it was writing, and can be continued.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medusa_heads.directories import alone_in
from medusa_runtime.bundle.files import is_leftover, read_json, write_whole
from medusa_runtime.bundle.manifest import Provenance
from medusa_runtime.bundle.versions import FileVersions
from medusa_runtime.errors import OptionError
from medusa_runtime.text.codec import Message

FACTS_NAME, ANSWERS_NAME = "data.json", "answers.jsonl"
VERSIONS = FileVersions("format_version", newest=1)


class Settings(BaseModel):
    """The settings that the answers depend on. A run can only be continued with the settings that it was started with."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(description="the model, as the user named it")
    tokenizer: str = Field(description="SHA-256 of the tokenizer's vocabulary")
    weights: str = Field(default="", description="SHA-256 of the weights that answered, or the endpoint's name for the model")
    backend: str
    dtype: str
    prompts: str = Field(description="SHA-256 of the selected prompts, in order")
    prompt_temperature: float = Field(description="temperature of the prompts that the model writes")
    max_new_tokens: int
    temperature: float
    seed: int
    max_prompt_tokens: int


class DataFacts(BaseModel):
    """`data.json`."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = VERSIONS.newest
    settings: Settings
    provenance: Provenance
    sources: dict[str, int] = Field(default_factory=dict, description="number of selected prompts of each source")


class Row(BaseModel):
    """One answer."""

    model_config = ConfigDict(extra="forbid")

    key: str
    source: str = ""
    messages: list[Message] = Field(description="the conversation, with the answer at the end")
    prompt_token_ids: list[int]
    response_token_ids: list[int] = Field(
        description="the answer's ids, including the end-of-sequence token if it ended with one"
    )
    finish_reason: str


class AnswerStore:
    """The directory of a run, open for appending. Use it as a context manager.

    Raises:
        OptionError: the path is not a directory, the directory has other files or answers made with other settings, or another
            run is writing to it.
    """

    def __init__(self, path: str | Path, facts: DataFacts) -> None:
        self.path = Path(path)
        require_place(self.path)
        with ExitStack() as held:
            held.enter_context(alone_in(self.path))
            self._require_same(facts)
            self.rows = self._recover()
            self.num_tokens = sum(len(row.response_token_ids) for row in self.rows.values())  # tokens of all answers
            self._file = held.enter_context((self.path / ANSWERS_NAME).open("a", encoding="utf-8"))
            self._held = held.pop_all()  # the lock, held until the store is closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def append(self, row: Row) -> None:
        """Append a row, completely."""
        self._file.write(json.dumps(row.model_dump(), ensure_ascii=False) + "\n")
        self._file.flush()
        self.rows[row.key] = row
        self.num_tokens += len(row.response_token_ids)

    def _require_same(self, facts: DataFacts) -> None:
        place, answers = self.path / FACTS_NAME, self.path / ANSWERS_NAME
        before, now = read_facts(self.path).settings.model_dump() if place.exists() else {}, facts.settings.model_dump()
        changed = [name for name in now if before.get(name) != now[name]]
        if changed and before and answers.exists() and answers.stat().st_size:
            told = "; ".join(f"{name} was {_short(before[name])}, is {_short(now[name])}" for name in changed)
            raise OptionError(f"{self.path} was started with other settings ({told}); choose another output")
        if changed:  # no answers were made with the earlier settings
            write_whole(place, facts.model_dump_json(indent=2) + "\n")

    def _recover(self) -> dict[str, Row]:
        """The existing rows. An incomplete last line is removed."""
        place = self.path / ANSWERS_NAME
        if not place.exists():
            return {}
        data = place.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with place.open("r+b") as file:
                file.truncate(len(whole))
        return {row.key: row for row in read_rows(self.path)}


def require_place(path: Path) -> None:
    """Check an output before the work starts: it must be a new or empty directory, or one with data.

    Raises:
        OptionError: the path is not a directory, or has other files in it.
    """
    standing = next(place for place in (path, *path.parents) if place.exists())
    if not standing.is_dir():
        raise OptionError(f"{standing} is not a directory; choose another output")
    if not (path / FACTS_NAME).exists() and any(not is_leftover(place.name) for place in path.glob("*")):
        raise OptionError(f"{path} has other files in it; choose another output")


def _short(value: object) -> object:
    """A setting's value for messages. A digest is shortened."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else value


def read_facts(path: str | Path) -> DataFacts:
    """Read the settings and facts of a data directory.

    Raises:
        OptionError: the path is not a data directory, or is damaged, or newer than this package.
    """
    place = Path(path) / FACTS_NAME
    try:
        data = read_json(place)
        if problem := VERSIONS.problem(data, "make the data again"):
            raise OptionError(f"{place} cannot be read: {problem}")
        return DataFacts.model_validate(data)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{path} is not data of `medusa-export distill`: {place.name} is missing or damaged; make it again"
        ) from error


def read_rows(path: str | Path) -> Iterator[Row]:
    """Read the answers of a data directory.

    Raises:
        OptionError: a row is damaged; the message gives the row's number.
    """
    place = Path(path) / ANSWERS_NAME
    with place.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Row.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise OptionError(f"{place}, row {number}: {where or 'row'}: {first['msg']}; remove it") from error
