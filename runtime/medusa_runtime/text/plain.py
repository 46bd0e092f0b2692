"""Users' text in a chat template's text: told apart, and encoded as plain text even if it is spelled like a special token.

A template puts its own control tokens, such as ``<|im_start|>``, around what users wrote. In the text that it gives, a control
token of its own and one that a user spelled look alike. So the template runs twice: on the messages as they are, and on
messages whose strings carry marks. The text of the first run is encoded; the marks in the second say which of its control
tokens users wrote.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from medusa_runtime.errors import OptionError
from medusa_runtime.text.conversation import Conversation
from medusa_runtime.text.tokenising import encoded

if TYPE_CHECKING:
    from medusa_runtime.text.template import ChatTemplate

CHANGED = "the chat template changes the contents, so that users' text cannot be told from its own; ask without plain_content"
READS_AS_SPECIAL = "the tokenizer makes a special token of plain text in this prompt; ask without plain_content"


class Control(NamedTuple):
    """A control token in a text: characters start to end."""

    start: int
    end: int
    token: str
    is_users: bool = False


class PlainContent:
    """Encodes conversations so that control tokens count only if the template wrote them.

    Control tokens are the tokenizer's special tokens, and those of its other added tokens that stand in a template.

    Args:
        tokenizer: the bundle's.
        literals: all texts that the templates themselves may write.
    """

    def __init__(self, tokenizer: Tokenizer, literals: Iterable[str]) -> None:
        written = "\0".join(literals)
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._ids = {
            token.content: token_id
            for token_id, token in added.items()
            if token.special or (token.content in written and not token.content.isspace())
        }
        self._pattern = _any_of(self._ids)
        self._risky = _any_of({letter for token in self._ids for letter in re.findall(r"\W", token)})
        self._eats_right = {token.content for token in added.values() if token.rstrip}
        self._eats_left = {token.content for token in added.values() if token.lstrip}
        unknown = getattr(tokenizer.model, "unk_token", None)  # may come of any text, and means nothing
        self._checked = {token_id for token, token_id in self._ids.items() if token != unknown}
        self._lock = Lock()
        self._copy: Tokenizer | None = None
        self._starts_with_space = False

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text that is the user's as a whole, with the tokens that the tokenizer puts around a text."""
        plain = self._plain()
        found = encoded(plain, self._at_start(text), add_special_tokens=True)
        if any(
            token in self._checked and not is_added
            for token, is_added in zip(found.ids, found.special_tokens_mask, strict=True)
        ):
            raise OptionError(READS_AS_SPECIAL)
        return list(found.ids)

    def controls(self, chat: ChatTemplate, name: str, conversation: Conversation, text: str) -> list[Control]:
        """The control tokens in the text that a template gave for a conversation.

        Args:
            chat: the bundle's.
            name: the template's.
            conversation: as `ChatTemplate.prepared` gives it.
            text: as `ChatTemplate.rendered` gives it.

        Raises:
            OptionError: the template changes users' text so that it cannot be found.
        """
        found = self._controls(text)
        strings = list(conversation.strings())
        if not any(map(self._is_risky, strings)):
            return found
        marks = Marks(*chat.unused([*strings, *chat.sources.values(), text], 4))
        marked = chat.rendered(name, conversation.mapped(lambda string: self._marked(string, marks)))
        if any(f"{ord(mark):x}" in marked.lower() for mark in marks.all):  # escaped, for example in JSON
            raise OptionError(CHANGED)
        bare, placed = marks.taken_out(marked)
        again = self._controls(bare)
        if [control.token for control in again] != [control.token for control in found]:
            raise OptionError(CHANGED)
        is_users = list(map(placed.is_users, again))
        return [control._replace(is_users=users) for control, users in zip(found, is_users, strict=True)]

    def token_ids(self, text: str, controls: Sequence[Control]) -> list[int]:
        """Token ids of a text whose `controls` are known.

        Raises:
            OptionError: the tokenizer makes a control token of plain text.
        """
        ids: list[int] = []
        for part, is_plain in self._parts(text, controls):
            tokenizer = self._plain() if is_plain else self._tokenizer
            ids += encoded(tokenizer, part, add_special_tokens=False).ids
        written = [self._ids[control.token] for control in controls if not control.is_users]
        if [token for token in ids if token in self._checked] != [token for token in written if token in self._checked]:
            raise OptionError(READS_AS_SPECIAL)
        return ids

    def _controls(self, text: str) -> list[Control]:
        return [Control(found.start(), found.end(), found[0]) for found in self._pattern.finditer(text)]

    def _is_risky(self, string: str) -> bool:
        """Whether a string spells a control token, or may be a part of one together with its neighbours."""
        return self._risky.search(string) is not None or self._pattern.search(string) is not None

    def _marked(self, string: str, marks: Marks) -> str:
        """A string with marks around its control tokens and around the text between them.

        White space around the string stays outside, and control tokens stay whole: so templates trim and split it as ever.
        """
        if not self._is_risky(string) or not (core := string.strip()):
            return string
        before, _, after = string.partition(core)
        pieces, start = [before], 0
        for control in self._controls(core):
            pieces += [marks.around_text(core[start : control.start]), marks.around_control(control.token)]
            start = control.end
        return "".join([*pieces, marks.around_text(core[start:]), after])

    def _parts(self, text: str, controls: Sequence[Control]) -> Iterator[tuple[str, bool]]:
        """A text in parts, and whether a part is plain: between two of the template's tokens, if users spell some there."""
        users = [control.start for control in controls if control.is_users]
        if not users:
            yield text, False
            return
        edges = [Control(0, 0, ""), *(one for one in controls if not one.is_users), Control(len(text), len(text), "")]
        start = 0
        for left, right in pairwise(edges):
            if bisect_left(users, left.end) == bisect_left(users, right.start):
                continue
            between = text[left.end : right.start]
            between = between.lstrip() if left.token in self._eats_right else between
            between = between.rstrip() if right.token in self._eats_left else between
            if left.end > start:
                yield text[start : left.end], False
            yield between if left.end else self._at_start(between), True
            start = right.start
        if start < len(text):
            yield text[start:], False

    def _plain(self) -> Tokenizer:
        """The tokenizer without control tokens. It is a copy, made when it is needed first."""
        with self._lock:
            if self._copy is None:
                settings = json.loads(self._tokenizer.to_str())
                for token in settings["added_tokens"]:
                    token["special"] = token["content"] in self._ids
                self._starts_with_space = _puts_no_space_first(settings["pre_tokenizer"])
                self._copy = Tokenizer.from_str(json.dumps(settings))
                self._copy.encode_special_tokens = True  # as text
            return self._copy

    def _at_start(self, text: str) -> str:
        """What stands at the beginning of the prompt, with the space that the copy does not put there."""
        self._plain()
        return f" {text}" if self._starts_with_space and not text.startswith((" ", "▁")) else text


@dataclass(frozen=True)
class Marks:
    """Four characters that stand nowhere else, around texts and control tokens that users wrote."""

    text_start: str
    text_end: str
    control_start: str
    control_end: str

    @property
    def all(self) -> tuple[str, ...]:
        """All four."""
        return self.text_start, self.text_end, self.control_start, self.control_end

    def around_text(self, text: str) -> str:
        """A text with its marks; nothing around nothing."""
        return f"{self.text_start}{text}{self.text_end}" if text else ""

    def around_control(self, token: str) -> str:
        """A control token with its marks."""
        return f"{self.control_start}{token}{self.control_end}"

    def taken_out(self, marked: str) -> tuple[str, PlacedMarks]:
        """A text without its marks, and where they stood."""
        pattern = _any_of(self.all)
        found = list(pattern.finditer(marked))
        return pattern.sub("", marked), PlacedMarks(
            self, [mark.start() - earlier for earlier, mark in enumerate(found)], [mark[0] for mark in found]
        )


class PlacedMarks:
    """Marks in a text from which they were taken: of each, the character that it stood before."""

    def __init__(self, marks: Marks, places: list[int], kinds: list[str]) -> None:
        self._marks, self._places, self._kinds = marks, places, kinds
        around = [place for place, kind in enumerate(kinds) if kind in (marks.text_start, marks.text_end)]
        self._text_places, self._text_kinds = [places[place] for place in around], [kinds[place] for place in around]

    def is_users(self, control: Control) -> bool:
        """Whether users wrote a control token, or a part of it. A template may lose marks, but it adds none.

        Raises:
            OptionError: the token stands inside a user's text that held no control token.
        """
        first, end = bisect_right(self._places, control.start), bisect_left(self._places, control.end)
        if first < end:  # a mark inside: the token is made of several texts
            return True
        before = first > 0 and (self._places[first - 1], self._kinds[first - 1])
        after = first < len(self._places) and (self._places[first], self._kinds[first])
        if before == (control.start, self._marks.control_start) and after == (control.end, self._marks.control_end):
            return True
        text = bisect_right(self._text_places, control.start)
        is_inside = self._text_kinds[max(0, text - 1) : text + 1] == [self._marks.text_start, self._marks.text_end]
        if text > 0 and is_inside:
            raise OptionError(CHANGED)
        return False


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the longest of some texts, or never anything if there is none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _puts_no_space_first(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Keep a tokenizer's settings from putting a space before a text's beginning; return whether they did."""
    if pre_tokenizer is None:
        return False
    if pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"
        return True
    changed = [_puts_no_space_first(part) for part in pre_tokenizer.get("pretokenizers", [])]
    return any(changed)
