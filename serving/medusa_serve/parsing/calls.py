"""Reads one tool call that is written as a JSON object, `{"name": …, "arguments": {…}}`."""

from __future__ import annotations

from enum import Enum, auto

from medusa_serve.parsing.json_scanner import SPACE, JsonScanner
from medusa_serve.parsing.output import Output
from medusa_serve.parsing.source import Reading, Source

ARGUMENTS = ("arguments", "parameters")  # names of the same member: each model has its own


class Outcome(Enum):
    """What a place where a call may be has turned out to be."""

    NOT_A_CALL = auto()  # nothing was given out
    CUT_SHORT = auto()  # a call was given out, then the text ended or stopped being JSON
    COMPLETE = auto()


class CallObject:
    """The call at a source's place. It is given out from the moment on when its name and the start of its arguments are known.

    Its members may come in any order. If one comes twice, the first counts. Members of other names are read over.
    """

    def __init__(self, source: Source, output: Output) -> None:
        self._source = source
        self._output = output
        self._name: str | None = None
        self._id: str | None = None
        self._waiting: str | None = None  # arguments that came before the name
        self._is_begun = False
        self._has_arguments = False  # they are whole

    def read(self) -> Reading[Outcome]:
        """Read the call."""
        if (yield from self._members()) and self._is_begun:
            return Outcome.COMPLETE
        return Outcome.CUT_SHORT if self._is_begun else Outcome.NOT_A_CALL

    def _members(self) -> Reading[bool]:
        """Read the object. Returns whether it is whole and nothing in it shows that it is no call."""
        source = self._source
        yield from source.take_all(SPACE)
        if not (yield from source.take("{")):
            return False
        yield from source.take_all(SPACE)
        if (yield from source.take("}")):
            return False
        while (key := (yield from self._key())) is not None:
            if not (yield from self._member(key)):
                return False
            yield from source.take_all(SPACE)
            if (yield from source.take("}")):
                return True
            if not (yield from source.take(",")):
                return False
        return False

    def _key(self) -> Reading[str | None]:
        """Read a member's name and its colon. Returns None if there is none."""
        source = self._source
        yield from source.take_all(SPACE)
        key = yield from source.string()
        if key is None:
            return None
        yield from source.take_all(SPACE)
        if not (yield from source.take(":")):
            return None
        yield from source.take_all(SPACE)
        return key

    def _member(self, key: str) -> Reading[bool]:
        """Read a member's value. Returns whether the object can still be a call."""
        if key == "name" and self._name is None:
            return (yield from self._read_name())
        if key in ARGUMENTS and not self._has_arguments:
            return (yield from self._read_arguments())
        if key == "id" and (yield from self._source.peek()) == '"':
            call_id = yield from self._source.string()
            self._id = self._id or call_id
            return call_id is not None
        return (yield from self._source.value(_drop))

    def _read_name(self) -> Reading[bool]:
        name = yield from self._source.string()
        if name is None or not self._output.knows(name):
            return False
        self._name = name
        if self._waiting is not None:
            self._begin(self._waiting)
            self._output.end_call()
        return True

    def _read_arguments(self) -> Reading[bool]:
        if (yield from self._source.peek()) != "{":
            text = yield from self._converted()
            if text is None:
                return False
            self._take_whole(text)
        elif self._name is not None:
            self._begin("")
            if not (yield from self._source.value(self._output.arguments)):
                return False
            self._output.end_call()
        else:
            parts: list[str] = []
            if not (yield from self._source.value(parts.append)):
                return False
            self._take_whole("".join(parts))
        self._has_arguments = True
        return True

    def _converted(self) -> Reading[str | None]:
        """Arguments that are not an object: some models write null, or the object's text as a string."""
        if (yield from self._source.take("null")):
            return "{}"
        text = yield from self._source.string()
        return text if text is not None and _is_object(text) else None

    def _take_whole(self, arguments: str) -> None:
        if self._name is None:
            self._waiting = arguments
        else:
            self._begin(arguments)
            self._output.end_call()

    def _begin(self, arguments: str) -> None:
        assert self._name is not None
        self._output.begin_call(self._name, self._usable_id())
        self._output.arguments(arguments)
        self._is_begun = True

    def _usable_id(self) -> str | None:
        """The id, if it can be sent as text."""
        return self._id if self._id and _is_unicode(self._id) else None


def read_array(source: Source, output: Output) -> Reading[Outcome]:
    """Read the rest of an array of calls, from behind its opening bracket. The source has to hold the place to return to.

    If what comes is no call, the source returns there, or to the end of the last call if there was one.
    """
    is_begun = False
    while True:
        outcome = yield from CallObject(source, output).read()
        if outcome is Outcome.NOT_A_CALL:
            source.rewind()
            return Outcome.CUT_SHORT if is_begun else Outcome.NOT_A_CALL
        is_begun = True
        source.hold()
        if outcome is Outcome.COMPLETE:
            yield from source.take_all(SPACE)
            if (yield from source.take("]")):
                source.release()
                return Outcome.COMPLETE
            if (yield from source.take(",")):
                continue
        source.rewind()
        return Outcome.CUT_SHORT


def _drop(_: str) -> None:
    pass


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON's escapes can stand for halves of characters."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _is_object(text: str) -> bool:
    """Whether a text is that of a JSON object."""
    stripped = text.strip(SPACE)
    scanner = JsonScanner()
    return stripped[:1] == "{" and scanner.feed(stripped) == len(stripped) and scanner.is_complete and _is_unicode(text)
