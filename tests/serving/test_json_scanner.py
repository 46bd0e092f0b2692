"""The scanner takes exactly the JSON values that Python's strict parser takes, however they are cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_serve.parsing.json_scanner import JsonScanner

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
CHARS = st.text(alphabet='{}[]",:\\ \n0123456789.-+eEtruefalsn"u', max_size=12)


def scan(text: str) -> tuple[int, bool, bool]:
    """Feed a text one character at a time."""
    scanner, taken = JsonScanner(), 0
    while taken < len(text) and not (scanner.is_complete or scanner.is_broken):
        taken += scanner.feed(text[taken])
    return taken, scanner.is_complete, scanner.is_broken


def strict_end(text: str) -> int | None:
    """Where Python's parser finds the end of the value at a text's start; None if there is no value."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    start = len(text) - len(text.lstrip(" \t\r\n"))
    try:
        return json.JSONDecoder(parse_constant=refuse).raw_decode(text, start)[1]
    except ValueError:
        return None


@given(VALUES, st.booleans(), st.sampled_from(["", "]", " x", "}", ', "a"']))
def test_it_takes_every_value_and_nothing_behind_it(value: object, ascii_only: bool, behind: str) -> None:
    text = json.dumps([value], ensure_ascii=ascii_only)
    scanner = JsonScanner()
    assert scanner.feed(text + behind) == len(text)
    assert scanner.is_complete
    assert scan(text + behind) == (len(text), True, False)


@given(CHARS.map(lambda text: "[" + text))
def test_it_agrees_with_the_strict_parser_on_any_text(text: str) -> None:
    taken, is_complete, is_broken = scan(text)
    end = strict_end(text)
    assert is_complete == (end is not None)
    if end is not None:
        assert taken == end
    if is_broken:  # no text that goes on like this is a value
        assert strict_end(text[: taken + 1] + '"]}1') is None


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("[01]", 2), ("[1.]", 3), ("[-]", 2), ("[1e]", 3), ("[+1]", 1), ("[.5]", 1), ("[tru ]", 4), ("[NaN]", 1),
        ('{"a" 1}', 5), ('{"a":}', 5), ('{"a":1,}', 7), ("[1,]", 3), ("{1:2}", 1), ('["\n"]', 2), ('["\\x"]', 3),
        ('["\\u12g4"]', 6), ("[1}", 2), ("[,", 1), ("[1 2]", 3), ("]", 0), (":", 0),
    ],
)  # fmt: skip
def test_it_stops_at_the_first_character_that_is_not_json(text: str, taken: int) -> None:
    assert scan(text) == (taken, False, True)


def test_a_number_ends_where_another_character_comes() -> None:
    scanner = JsonScanner()
    assert scanner.feed("-12.5e+3,") == 8
    assert scanner.is_complete


def test_nesting_has_no_limit() -> None:
    text = "[" * 100_000 + "]" * 100_000
    scanner = JsonScanner()
    assert scanner.feed(text) == len(text)
    assert scanner.is_complete
