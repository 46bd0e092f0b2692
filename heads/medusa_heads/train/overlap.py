"""Keeping evaluation texts out of training data, by the n-grams of words they share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medusa_runtime.errors import OptionError

WORDS = 13  # in a row: what counts as a copy
FEWEST_WORDS = 5  # a shorter text is no sign of anything
WORD = re.compile(r"\w+")

NGram = tuple[str, ...]


class Overlap:
    """N-grams of some files' texts, to find copies of them.

    A text of at least `FEWEST_WORDS` but fewer than `WORDS` words counts as a whole.

    Args:
        paths: JSON lines, of which every text counts whatever its field, or plain text, of which every line does.

    Raises:
        OptionError: a file cannot be read, or holds no text.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.ngrams: dict[int, set[NGram]] = {}  # by length
        for path in map(Path, paths):
            found = [words for text in _texts(path) if len(words := split_words(text)) >= FEWEST_WORDS]
            if not found:
                raise OptionError(f"{path} holds no text of {FEWEST_WORDS} words or more to keep out")
            for words in found:
                length = min(WORDS, len(words))
                self.ngrams.setdefault(length, set()).update(ngrams(words, length))

    def found_in(self, text: str) -> bool:
        """Whether the text shares an n-gram with the files."""
        words = split_words(text)
        return any(not known.isdisjoint(ngrams(words, length)) for length, known in self.ngrams.items())


def split_words(text: str) -> list[str]:
    """Words in lower case, without what stands between them."""
    return WORD.findall(text.lower())


def ngrams(words: Sequence[str], length: int) -> Iterator[NGram]:
    """All runs of so many words."""
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _texts(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix.lower() not in {".jsonl", ".json"}:
            yield line
            continue
        try:
            yield from _strings(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{path}, row {number} is not JSON: {error}") from error


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
