"""Follows one JSON value through text that comes in pieces."""

from __future__ import annotations

import re
from enum import Enum, auto

SPACE = " \t\r\n"  # what JSON takes as white space
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # characters of a string that stand for themselves
_CLOSING = {"{": "}", "[": "]"}
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
# How a number goes on: state -> kinds of characters -> state. Numbers may end in the states of _NUMBER_ENDS.
_NUMBER = {
    "-": {"0": "0", "1-9": "int"},
    "0": {".": ".", "e": "e"},
    "int": {"0": "int", "1-9": "int", ".": ".", "e": "e"},
    ".": {"0": "frac", "1-9": "frac"},
    "frac": {"0": "frac", "1-9": "frac", "e": "e"},
    "e": {"+": "sign", "-": "sign", "0": "exp", "1-9": "exp"},
    "sign": {"0": "exp", "1-9": "exp"},
    "exp": {"0": "exp", "1-9": "exp"},
}
_NUMBER_ENDS = {"0", "int", "frac", "exp"}


class _State(Enum):
    VALUE = auto()  # a value has to come
    FIRST_ITEM = auto()  # a value, or the end of an array
    FIRST_KEY = auto()  # a key, or the end of an object
    KEY = auto()
    COLON = auto()
    NEXT = auto()  # a comma, or the end of the array or object
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    LITERAL = auto()
    NUMBER = auto()
    COMPLETE = auto()
    BROKEN = auto()


class JsonScanner:
    """Takes the text of one JSON value in pieces, and finds where the value ends or stops being JSON.

    It is as strict as RFC 8259. It keeps the nesting alone, so no value is too long or too deep.
    """

    def __init__(self) -> None:
        self._state = _State.VALUE
        self._nesting: list[str] = []  # the open brackets, outermost first
        self._is_key = False  # the string at hand is an object's key
        self._expected = ""  # of a literal: the characters that are missing
        self._num_hex = 0  # of an escape: the digits that are missing
        self._number = ""  # the state within a number, a key of _NUMBER

    @property
    def is_complete(self) -> bool:
        """Whether the value has ended. A number outside brackets ends at the first character that is not its own."""
        return self._state is _State.COMPLETE

    @property
    def is_broken(self) -> bool:
        """Whether the next character makes the text no JSON value."""
        return self._state is _State.BROKEN

    def feed(self, text: str, start: int = 0) -> int:
        """Take the next piece of text, which begins at `start`.

        Returns:
            The end of the part that belongs to the value. If this is not the text's end, the value is complete or broken.
        """
        place = start
        while place < len(text) and self._state not in {_State.COMPLETE, _State.BROKEN}:
            if self._state is _State.STRING:
                match = _PLAIN.match(text, place)
                place = match.end() if match else place
                if place == len(text):
                    break
            place += self._step(text[place])
        return place

    def _step(self, char: str) -> int:
        """Take one character. Returns 1, or 0 if the character does not belong to the value or must be looked at again."""
        match self._state:
            case _State.STRING:
                return self._in_string(char)
            case _State.ESCAPE:
                return self._in_escape(char)
            case _State.HEX:
                return self._in_hex(char)
            case _State.LITERAL:
                return self._in_literal(char)
            case _State.NUMBER:
                return self._in_number(char)
        return 1 if char in SPACE else self._between(char)

    def _between(self, char: str) -> int:
        state = self._state
        if state is _State.COLON and char == ":":
            self._state = _State.VALUE
        elif state is _State.NEXT and char == ",":
            self._state = _State.KEY if self._nesting[-1] == "{" else _State.VALUE
        elif state in {_State.NEXT, _State.FIRST_KEY, _State.FIRST_ITEM} and char == _CLOSING[self._nesting[-1]]:
            self._nesting.pop()
            self._end_value()
        elif state in {_State.KEY, _State.FIRST_KEY} and char == '"':
            self._state, self._is_key = _State.STRING, True
        elif state in {_State.VALUE, _State.FIRST_ITEM}:
            return self._begin_value(char)
        else:
            return self._break()
        return 1

    def _begin_value(self, char: str) -> int:
        if char in _CLOSING:
            self._nesting.append(char)
            self._state = _State.FIRST_KEY if char == "{" else _State.FIRST_ITEM
        elif char == '"':
            self._state, self._is_key = _State.STRING, False
        elif char in _LITERALS:
            self._state, self._expected = _State.LITERAL, _LITERALS[char]
        elif char in "-0123456789":
            self._state, self._number = _State.NUMBER, char if char in "-0" else "int"
        else:
            return self._break()
        return 1

    def _end_value(self) -> None:
        self._state = _State.NEXT if self._nesting else _State.COMPLETE

    def _break(self) -> int:
        self._state = _State.BROKEN
        return 0

    def _in_string(self, char: str) -> int:
        if char == "\\":
            self._state = _State.ESCAPE
        elif char != '"':  # a control character
            return self._break()
        elif self._is_key:
            self._state = _State.COLON
        else:
            self._end_value()
        return 1

    def _in_escape(self, char: str) -> int:
        if char == "u":
            self._state, self._num_hex = _State.HEX, 4
        elif char in '"\\/bfnrt':
            self._state = _State.STRING
        else:
            return self._break()
        return 1

    def _in_hex(self, char: str) -> int:
        if char not in "0123456789abcdefABCDEF":
            return self._break()
        self._num_hex -= 1
        if not self._num_hex:
            self._state = _State.STRING
        return 1

    def _in_literal(self, char: str) -> int:
        if char != self._expected[0]:
            return self._break()
        self._expected = self._expected[1:]
        if not self._expected:
            self._end_value()
        return 1

    def _in_number(self, char: str) -> int:
        kind = "1-9" if char in "123456789" else "e" if char in "eE" else char
        if kind in _NUMBER[self._number]:
            self._number = _NUMBER[self._number][kind]
            return 1
        if self._number not in _NUMBER_ENDS:
            return self._break()
        self._end_value()
        return 0
