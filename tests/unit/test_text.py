"""Chat templates and streaming text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from medusa_runtime import BundleError, OptionError
from medusa_runtime.text import TextCodec, TextStream
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
