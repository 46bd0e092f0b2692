"""Text that comes in pieces, read by parsers that are written as if all of it was there.

A parser is a generator. It yields when it needs more text, and goes on once there is more or the text has ended. So its
result cannot depend on how the text was cut into pieces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import TypeVar

from medusa_serve.parsing.json_scanner import SPACE, JsonScanner

Result = TypeVar("Result")
Reading = Generator[None, None, Result]  # a parser that returns a `Result`


class Source:
    """The text that was not read yet. `hold` marks a place to which `rewind` returns."""

    def __init__(self) -> None:
        self._text = ""
        self._place = 0  # of the next character to read
        self._held: int | None = None  # the place that is marked
        self.has_ended = False  # no more text will come

    def add(self, text: str) -> None:
        """Take the next piece of text. Text that nobody can return to is forgotten."""
        start = self._place if self._held is None else self._held
        self._text = self._text[start:] + text
        self._place -= start
        if self._held is not None:
            self._held = 0

    @property
    def rest(self) -> str:
        """The text that is there and not read."""
        return self._text[self._place :]

    def skip(self, count: int) -> None:
        """Move on by some characters."""
        self._place += count

    def hold(self) -> None:
        """Mark this place, instead of the place that was marked before."""
        self._held = self._place

    def rewind(self) -> None:
        """Return to the mark, and remove it."""
        assert self._held is not None
        self._place, self._held = self._held, None

    def release(self) -> None:
        """Remove the mark."""
        self._held = None

    def peek(self) -> Reading[str]:
        """The next character, which stays unread. Empty if the text has ended."""
        while self._place >= len(self._text):
            if self.has_ended:
                return ""
            yield
        return self._text[self._place]

    def take(self, literal: str) -> Reading[bool]:
        """Read a literal if it comes next. Returns whether it does; if not, nothing is read."""
        while len(self._text) - self._place < len(literal):
            if self.has_ended or not literal.startswith(self.rest):
                return False
            yield
        found = self._text.startswith(literal, self._place)
        self._place += len(literal) if found else 0
        return found

    def take_all(self, chars: str) -> Reading[str]:
        """Read all characters that come next and are among `chars`."""
        found = ""
        while (char := (yield from self.peek())) and char in chars:
            found += char
            self.skip(1)
        return found

    def until(self, marker: str, write: Callable[[str], object], spaces: str = SPACE) -> Reading[str | None]:
        """Read up to the end of a marker. `spaces` before the marker belong to it.

        Args:
            marker: the text to look for.
            write: gets the text before the marker, as soon as it cannot be a part of the marker.
            spaces: the characters that count as white space.

        Returns:
            The marker with the white space before it. None if the text ended without a marker; then `write` got all of it.
        """
        while True:
            start = self._place
            found = self._text.find(marker, start)
            if found < 0 and self.has_ended:
                text = self.rest
                self.skip(len(text))
                write(text)
                return None
            stop = found if found >= 0 else len(self._text) - _overlap(self.rest, marker)
            certain = self._text[start:stop].rstrip(spaces)
            self.skip(len(certain))
            write(certain)
            if found >= 0:
                self._place = found + len(marker)
                return self._text[start + len(certain) : self._place]
            yield

    def to_end(self, write: Callable[[str], object]) -> Reading[None]:
        """Read all that comes. `write` gets it as it comes."""
        while (yield from self.peek()):
            text = self.rest
            self.skip(len(text))
            write(text)

    def value(self, write: Callable[[str], object]) -> Reading[bool]:
        """Read a JSON value.

        Args:
            write: gets the value's text as it comes.

        Returns:
            Whether the value is complete. If not, the text has ended, or its next character is not JSON.
        """
        scanner = JsonScanner()
        while True:
            yield from self.peek()
            start = self._place
            self._place = scanner.feed(self._text, start)
            if self._place > start:
                write(self._text[start : self._place])
            if scanner.is_complete:
                return True
            if scanner.is_broken or self.has_ended:
                return False

    def string(self) -> Reading[str | None]:
        """Read a JSON string. Returns the text for which it stands, or None if there is no whole string."""
        if (yield from self.peek()) != '"':
            return None
        parts: list[str] = []
        if not (yield from self.value(parts.append)):
            return None
        text: str = json.loads("".join(parts))
        return text


def _overlap(text: str, marker: str) -> int:
    """How many of the last characters are the first ones of a marker, which is not in the text as a whole."""
    return next(size for size in range(min(len(marker) - 1, len(text)), -1, -1) if text.endswith(marker[:size]))
