"""Text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_runtime.text.codec import TextCodec


class TextStream:
    """Text of one answer as its tokens come: a piece is given out once no later token can change it.

    A piece is what the tokens since the last piece add to the text of the piece before it: decoders join neighbours, and no
    further back. While that ends in a replacement character, bytes of a character may be missing, and it is held back.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._window: list[int] = []  # tokens of the last piece, then those held back
        self._num_given = 0  # of the window

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens, return the text they complete."""
        self._window.extend(token_ids)
        piece = self._held()
        if not piece or piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._window = self._window[self._num_given :]
        self._num_given = len(self._window)
        return piece

    def finish(self) -> str:
        """Return what was held back, such as a character whose last bytes never came."""
        return self._held()

    def _held(self) -> str:
        given = self._codec.decode(self._window[: self._num_given])
        return self._codec.decode(self._window)[len(given) :]


class StopStrings:
    """Finds strings in text that comes in pieces, and holds back what may be the beginning of one.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take a piece; return the text that is certain now, and whether a stop string follows it."""
        text = self._held + piece
        if found := [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]:
            self._held = ""
            _, start = min(found)  # the one that is complete first, whatever the pieces
            return text[:start], True
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """How many of the last characters are the first ones of a stop string."""
        return next(size for size in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:size]))
