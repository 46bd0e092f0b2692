"""Chat templates and streaming text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from medusa_runtime import BundleError, OptionError
from medusa_runtime.text.codec import TextCodec
from medusa_runtime.text.stream import StopStrings, TextStream
from tests.support.models import CHAT_TEMPLATE, tokenizer

BYTES_AND_WORDS = ["<0x0A>", "<0xE6>", "<0x97>", "<0xA5>", "<0xF0>", "▁a", "▁", "b", "日"]
TEXT = "a naïve café costs 3€ — 日本語, Ελληνικά, 👩🏽‍🚀 and a tab\tand\nlines"


@pytest.fixture
def bundle(tmp_path):
    tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))

    def make(template=CHAT_TEMPLATE) -> TextCodec:
        chat = {"template": template, "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"}}
        (tmp_path / "chat.json").write_text(json.dumps(chat))
        return TextCodec(tmp_path)

    make.directory = tmp_path
    return make


def test_text_becomes_one_user_message(bundle) -> None:
    codec = bundle()
    messages = [{"role": "user", "content": "a fox"}]
    assert codec.encode("a fox") == codec.encode(messages)
    assert codec.render(messages) == "<|user|>a fox<|end|><|assistant|>"


def test_raw_text_is_taken_as_it_is(bundle) -> None:
    codec = bundle()
    assert codec.decode(codec.encode("a fox", raw=True)) == "a fox"
    assert bundle(None).encode("a fox") == codec.encode("a fox", raw=True)


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{{ bos_token }}{% if tools is not none %}tools{% endif %}{{ messages | tojson }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}!{% endfor %}",
        "{%- if documents %}\n  docs\n{%- endif %}\n  {{ messages[0]['content'] | trim }}\n",
    ],
)
def test_templates_render_as_in_transformers(bundle, template: str) -> None:
    messages = [{"role": "system", "content": " be short "}, {"role": "user", "content": "a {{ fox }} is <b>é"}]
    theirs = tokenizer().apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert bundle(template).render(messages) == theirs


def test_bytes_that_are_no_text_are_refused(bundle) -> None:
    with pytest.raises(OptionError, match="not Unicode text"):
        bundle().encode("a\udcffb")


@pytest.mark.parametrize("chat", ["[]", "{}", '{"template": null, "special_tokens": 3}', "{"])
def test_a_damaged_chat_file_is_named(bundle, chat: str) -> None:
    codec = bundle()
    (bundle.directory / "chat.json").write_text(chat)
    with pytest.raises(BundleError, match=r"chat\.json"):
        codec.encode("a fox")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_streamed_pieces_make_up_the_text(bundle, size) -> None:
    codec = bundle()
    ids = codec.encode(TEXT, raw=True)
    stream = TextStream(codec)
    pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join(pieces) + stream.finish() == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@given(st.lists(st.sampled_from(BYTES_AND_WORDS), max_size=12), st.integers(1, 4))
def test_bytes_as_tokens_never_stop_a_stream(tokens, size) -> None:
    """The byte-fallback tokenizers of Llama 2 and its kin, on any sequence, even of bytes that form no character."""
    vocabulary = {token: index for index, token in enumerate(BYTES_AND_WORDS)}
    core = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    codec = TextCodec.__new__(TextCodec)
    codec.tokenizer = core
    ids = [vocabulary[token] for token in tokens]
    stream = TextStream(codec)
    text = "".join(stream.push(ids[start : start + size]) for start in range(0, len(ids), size)) + stream.finish()
    whole = codec.decode(ids)
    assert text.count("b") == whole.count("b") == tokens.count("b")
    if "\N{REPLACEMENT CHARACTER}" not in whole:
        assert text == whole


def test_an_answer_cut_inside_a_character_says_so_only_at_its_end(bundle) -> None:
    codec = bundle()
    ids = codec.encode("日", raw=True)[:-1]
    stream = TextStream(codec)
    assert stream.push(ids) == ""
    assert stream.finish() == codec.decode(ids) != ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",  # which Jinja 3.1.5 lets through
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system role') }}",
        "{{ undefined_function() }}",
    ],
)
def test_a_template_can_neither_reach_out_nor_change_the_messages(bundle, template) -> None:
    with pytest.raises(OptionError, match="template refuses"):
        bundle(template).render([{"role": "user", "content": "x"}])


def test_a_template_that_is_no_template_is_refused(bundle) -> None:
    with pytest.raises(OptionError, match="template"):
        bundle("{% for %}").render([{"role": "user", "content": "x"}])


def test_messages_of_another_form_are_refused(bundle) -> None:
    with pytest.raises(OptionError, match="role and content"):
        bundle().encode([{"text": "x"}])
    with pytest.raises(OptionError, match="no chat template"):
        bundle(None).encode([{"role": "user", "content": "x"}])
    with pytest.raises(OptionError, match="raw takes text"):
        bundle().encode([{"role": "user", "content": "x"}], raw=True)


def test_a_damaged_tokenizer_is_named(bundle) -> None:
    (bundle.directory / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        bundle()


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
