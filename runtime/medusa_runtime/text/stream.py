"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """Turns token ids into text, as `TextCodec` does."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""


class TextStream:
    """The text of one answer as its tokens come. Text is given out once no later token can change it.

    Decoding a token can change how the previous piece joins on, but nothing earlier. So we decode the tokens of the previous
    piece and the new ones together and give out the difference. A replacement character at the end may stand for a character
    whose last bytes have not come, so it is held back. All pieces together are the text of all tokens, whatever the steps.
    """

    def __init__(self, codec: Decoder) -> None:
        self._codec = codec
        self._window: list[int] = []  # tokens of the last piece, then those whose text is not complete
        self._num_old_tokens = 0  # of the window: those of the last piece
        self._num_given = 0  # characters of the window's text

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens, return the text they complete."""
        self._window.extend(token_ids)
        text = self._codec.decode(self._window)
        if text.endswith(UNKNOWN):
            piece = text[self._num_given : -1]
            self._num_given += len(piece)
            return piece
        piece = text[self._num_given :]
        self._num_given = len(text)
        if piece:
            self._window = self._window[self._num_old_tokens :]
            self._num_old_tokens = len(self._window)
            self._num_given = len(self._codec.decode(self._window))
        return piece

    def finish(self) -> str:
        """Return the text that was held back, such as a character whose last bytes never came."""
        piece = self._codec.decode(self._window)[self._num_given :]
        self._num_given += len(piece)
        return piece


class StopStrings:
    """Finds strings in text that comes in pieces, and holds back what may be the beginning of one.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Take a piece; return the text that is certain now, and the stop string that follows it, if one does."""
        text = self._held + piece
        if found := [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]:
            self._held = ""
            _, start, stop = min(found)  # the one that is complete first, however the text was cut into pieces
            return text[:start], stop
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """How many of the last characters are the first ones of a stop string."""
        return next(size for size in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:size]))
