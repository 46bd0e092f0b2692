"""Streaming text, and stop strings in it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime.text.codec import TextCodec
from medusa_runtime.text.stream import StopStrings, TextStream
from tests.support.text import BYTES, byte_fallback_tokenizer, saved_codec

TEXT = "a naïve café costs 3€ — 日本語, Ελληνικά, 👩🏽‍🚀 and a tab\tand\nlines"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
SIZES = pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> TextCodec:
    return saved_codec(tmp_path_factory.mktemp("byte-level"))


@pytest.fixture(scope="module", params=[False, True], ids=["", "strip"])
def fallback(tmp_path_factory, request) -> TextCodec:
    """Byte tokens, as Llama 2 and its kin have them."""
    core = byte_fallback_tokenizer("▁a", "b", "日", strip=request.param)
    return saved_codec(tmp_path_factory.mktemp("byte-fallback"), core=core)


def streamed(codec: TextCodec, ids: list[int], size: int) -> list[str]:
    """The pieces of an answer whose tokens come `size` at a time, and what was held back to the end."""
    stream = TextStream(codec)
    return [*(stream.push(ids[start : start + size]) for start in range(0, len(ids), size)), stream.finish()]


def byte_ids(codec: TextCodec, data: bytes) -> list[int]:
    return [codec.tokenizer.token_to_id(BYTES[byte]) for byte in data]


@SIZES
def test_streamed_pieces_make_up_the_text(codec, size) -> None:
    *pieces, rest = streamed(codec, codec.encode(TEXT, raw=True), size)
    assert "".join(pieces) == TEXT
    assert rest == ""
    assert UNKNOWN not in "".join(pieces)


@SIZES
def test_an_answer_cut_inside_a_character_keeps_the_characters_before(fallback, size) -> None:
    ids = byte_ids(fallback, "😀😀".encode()[:5])
    assert fallback.decode(ids) == f"😀{UNKNOWN}"
    assert "".join(streamed(fallback, ids, size)) == f"😀{UNKNOWN}"


@pytest.mark.parametrize(
    "data",
    [
        b"\xf0\x9f\x98",
        b"\xff\xfe",
        b"a\xe6\x97b",
        b"\xe6\x97\xa5\xe6\x97",
        b"\xed\xa0\x80",  # a surrogate: three bytes that are each wrong
        b"\xc3\xa9\xc3\xff\xf0\x9f\x98\x80",
        "▁".encode(),  # not a space, though the token of this spelling is one
    ],
)
@SIZES
def test_bytes_are_decoded_as_python_does(fallback, data, size) -> None:
    expected = data.decode(errors="replace")
    assert fallback.decode(byte_ids(fallback, data)) == expected
    assert "".join(streamed(fallback, byte_ids(fallback, data), size)) == expected


def test_a_character_is_whole_across_a_special_token(fallback) -> None:
    start, *rest = byte_ids(fallback, "😀".encode())
    ids = [start, fallback.special_token_id("</s>"), *rest, 10**6]
    assert fallback.decode(ids) == "😀"
    assert "".join(streamed(fallback, ids, 1)) == "😀"


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 4))
def test_any_tokens_give_the_same_text_in_any_steps(fallback, codec, data, size) -> None:
    tokens = ["<0x0A>", "<0xE6>", "<0x97>", "<0xA5>", "<0xF0>", "<0xFF>", "<s>", "▁a", "▁", "b", "日"]
    one = data.draw(st.lists(st.sampled_from(tokens), max_size=12))
    ids = [fallback.tokenizer.token_to_id(token) for token in one]
    *pieces, rest = streamed(fallback, ids, size)
    assert "".join(pieces) + rest == fallback.decode(ids)
    assert rest in ("", UNKNOWN)  # nothing but the last character is ever held back
    ids = data.draw(st.lists(st.integers(0, 319), max_size=12))
    *pieces, rest = streamed(codec, ids, size)
    assert "".join(pieces) + rest == codec.decode(ids)
    assert rest in ("", UNKNOWN)


def test_complete_characters_are_given_out_before_an_incomplete_one(codec) -> None:
    ids = codec.encode("日本", raw=True)
    stream = TextStream(codec)
    assert stream.push(ids[:-1]) == "日"
    assert stream.finish() == UNKNOWN
    assert stream.finish() == ""


# Stop strings


def until_stopped(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """What is given out of a text that comes in pieces, and whether a stop string ended it."""
    stream, text = StopStrings(stops), ""
    for piece in pieces:
        certain, stopped = stream.push(piece)
        text += certain
        if stopped:
            assert stream.finish() == ""
            return text, True
    return text + stream.finish(), False


def cut(text: str, places: list[int]) -> list[str]:
    """A text in pieces, some of them perhaps empty."""
    ends = sorted(min(place, len(text)) for place in places)
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


few_letters = st.text("ab.", max_size=14)
some_places = st.lists(st.integers(0, 14), max_size=8)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(text=few_letters, stop=st.text("ab.", min_size=1, max_size=5), places=some_places)
def test_a_stop_string_is_found_where_the_whole_text_has_it(text, stop, places) -> None:
    found = text.find(stop)
    expected = (text[:found], True) if found >= 0 else (text, False)
    assert until_stopped([stop], cut(text, places)) == expected
    assert until_stopped([stop], list(text)) == expected


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(text=few_letters, stops=st.lists(st.text("ab.", min_size=1, max_size=5), max_size=4), places=some_places)
def test_of_several_stop_strings_the_one_that_is_complete_first_ends_the_text_whatever_the_pieces(text, stops, places) -> None:
    """And of several that are complete at once the longest. So the answer depends neither on tokens nor on steps."""
    found = min(((place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0), default=None)
    expected = (text[: found[1]], True) if found is not None else (text, False)
    assert until_stopped(stops, cut(text, places)) == expected
    assert until_stopped(stops, list(text)) == expected
    assert until_stopped(stops, [text]) == expected


@settings(max_examples=500, deadline=None, derandomize=True)
@given(text=few_letters, stops=st.lists(st.text("ab.", min_size=1, max_size=5), max_size=4), places=some_places)
def test_nothing_of_a_stop_string_is_ever_given_out_and_nothing_else_held_back(text, stops, places) -> None:
    stream, given_out, come = StopStrings(stops), "", ""
    for piece in cut(text, places):
        certain, stopped = stream.push(piece)
        given_out, come = given_out + certain, come + piece
        assert not any(stop in given_out for stop in stops)
        if stopped:
            assert any(come.startswith(stop, len(given_out)) for stop in stops)
            return
        assert come.startswith(given_out)
        held = come[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in stops)
        begun = [size for stop in stops for size in range(1, len(stop)) if come.endswith(stop[:size])]
        assert len(held) == max(begun, default=0)
    assert given_out + stream.finish() == text


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["aab"], ["aa", "ab"], ("a", True)),  # the first beginning is not the right one
        (["abab!"], ["ab", "ab", "ab", "!"], ("ab", True)),
        (["\n\n"], ["one\n", "two\n", "\nthree"], ("one\ntwo", True)),
        (["\n\n"], ["one\n"], ("one\n", False)),  # held back until the end, and then given out
        (["ab", "bc"], ["a", "bc"], ("", True)),
        (["bc", "abc"], ["a", "b", "c"], ("", True)),
        (["xyz", "y"], ["x", "yz"], ("x", True)),
        (["日本"], ["日", "本"], ("", True)),
        ([], ["a", "b"], ("ab", False)),
        (["a"], ["", "", ""], ("", False)),
    ],
)
def test_stop_strings_by_hand(stops, pieces, expected) -> None:
    assert until_stopped(stops, pieces) == expected
