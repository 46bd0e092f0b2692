"""Keeps evaluation texts out of training data, by shared n-grams of words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medusa_runtime.errors import OptionError

WORDS = 13  # this many equal words in a row count as a copy
FEWEST_WORDS = 5  # shorter texts are ignored
WORD = re.compile(r"\w+")

NGram = tuple[str, ...]


class Overlap:
    """The n-grams of words in some files, to find copies of their texts.

    A text of at least `FEWEST_WORDS` but fewer than `WORDS` words is one n-gram as a whole.

    Args:
        paths: JSON lines, of which all strings are used, or plain-text files, of which each line is a text.

    Raises:
        OptionError: a file cannot be read, or has no text.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.ngrams: dict[int, set[NGram]] = {}  # by length
        for path in map(Path, paths):
            found = [words for text in _texts(path) if len(words := split_words(text)) >= FEWEST_WORDS]
            if not found:
                raise OptionError(f"{path} has no text of {FEWEST_WORDS} or more words to keep out; give another file")
            for words in found:
                length = min(WORDS, len(words))
                self.ngrams.setdefault(length, set()).update(ngrams(words, length))

    def found_in(self, text: str) -> bool:
        """Whether the text shares an n-gram with the files."""
        words = split_words(text)
        return any(not known.isdisjoint(ngrams(words, length)) for length, known in self.ngrams.items())


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def ngrams(words: Sequence[str], length: int) -> Iterator[NGram]:
    """All runs of `length` words."""
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
