"""Prompts to token ids and back."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from medusa_runtime import BundleError, CapacityError, OptionError
from medusa_runtime.text import tokenising
from medusa_runtime.text.bounds import LengthBound
from medusa_runtime.text.codec import TextCodec
from medusa_runtime.text.token_bytes import byte_letters
from tests.support.models import tokenizer
from tests.support.text import byte_fallback_tokenizer, saved_codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> TextCodec:
    return saved_codec(tmp_path_factory.mktemp("codec"))


def test_text_becomes_one_user_message(codec) -> None:
    messages = [{"role": "user", "content": "a fox"}]
    assert codec.encode("a fox") == codec.encode(messages)
    assert codec.render(messages) == codec.render("a fox") == "<|user|>a fox<|end|><|assistant|>"


def test_raw_text_is_taken_as_it_is(codec, tmp_path) -> None:
    assert codec.decode(codec.encode("a fox", raw=True)) == "a fox"
    assert saved_codec(tmp_path, None).encode("a fox") == codec.encode("a fox", raw=True)


@pytest.mark.parametrize("options", [{}, {"raw": True}, {"plain_content": True}, {"raw": True, "plain_content": True}])
def test_bytes_that_are_no_text_are_refused(codec, options) -> None:
    with pytest.raises(OptionError, match="not Unicode text"):
        codec.encode("a\udcffb<", **options)


def test_a_damaged_tokenizer_is_named(tmp_path) -> None:
    saved_codec(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        TextCodec(tmp_path)


@pytest.mark.parametrize(
    "chat",
    [
        "[]",
        "{}",
        '{"template": null, "special_tokens": 3}',
        "{",
        '{"template": 3, "special_tokens": {}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_a_damaged_chat_file_is_named(tmp_path, chat: str) -> None:
    saved_codec(tmp_path)
    (tmp_path / "chat.json").write_text(chat, encoding="latin-1")
    with pytest.raises(BundleError, match=r"chat\.json .*export the bundle again"):
        TextCodec(tmp_path)


def test_an_open_codec_needs_its_files_no_longer(tmp_path) -> None:
    codec = saved_codec(tmp_path)
    expected = codec.encode("a fox")
    (tmp_path / "chat.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    assert codec.encode("a fox") == expected


def test_the_chat_file_is_utf8_in_any_locale(tmp_path) -> None:
    """Under Latin-1, DeepSeek's markers became other characters, and so other tokens."""
    saved_codec(tmp_path, "<\uff5cUser\uff5c>{{ messages[0].content }}")
    code = f"from medusa_runtime.text.codec import TextCodec\nprint(ascii(TextCodec({str(tmp_path)!r}).render(chr(233))))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ascii("<\uff5cUser\uff5c>é")


def test_special_tokens_are_known_by_their_spelling(codec) -> None:
    """A stop text that is a special token is a stop token: text never shows it."""
    assert codec.special_token_id("<|end|>") == codec.tokenizer.token_to_id("<|end|>")
    assert codec.special_token_id("the") is None
    assert codec.special_token_id("no token") is None


# Tokens that the tokenizer puts first


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory) -> TextCodec:
    core = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return saved_codec(tmp_path_factory.mktemp("bos"), "{{ bos_token }}{{ messages[0].content }}", core=core)


@pytest.mark.parametrize("text", ["a fox", "<s>a fox", ""])
def test_raw_text_has_one_token_at_its_beginning(with_bos, text) -> None:
    expected = [0, *with_bos.tokenizer.encode(text.removeprefix("<s>"), add_special_tokens=False).ids]
    assert with_bos.encode(text, raw=True) == expected


def test_a_template_that_writes_the_first_token_gets_no_second_one(with_bos) -> None:
    expected = with_bos.encode("a fox")
    assert expected.count(0) == 1
    assert with_bos.encode(with_bos.render("a fox"), raw=True) == expected


def test_only_the_token_that_is_put_there_is_left_out(with_bos) -> None:
    assert with_bos.encode("<s><s>a", raw=True)[:2] == [0, 0]
    assert with_bos.encode("a<s>", raw=True)[-1] == 0


def test_what_the_tokenizer_puts_behind_a_text_stays_there(tmp_path) -> None:
    core = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    codec = saved_codec(tmp_path, None, core=core)
    assert codec.encode("<s>", raw=True) == codec.encode("", raw=True) == [0, 1]


# Texts that are too long


@pytest.mark.parametrize("options", [{"raw": True}, {}, {"plain_content": True}, {"raw": True, "plain_content": True}])
def test_a_long_text_has_the_tokens_it_always_has(codec, options, monkeypatch) -> None:
    text = "the quick <|user|> brown\n fox </s> " * 500
    assert len(text) > tokenising.LONG
    long = codec.encode(text, **options)
    monkeypatch.setattr(tokenising, "LONG", 2 * len(text))
    assert codec.encode(text, **options) == long


def test_other_threads_go_on_while_a_long_text_is_tokenised(codec) -> None:
    """Python's lock is free meanwhile: event loops and the thread that decodes do not wait."""
    done, num_ticks = threading.Event(), itertools.count()

    def tick() -> None:
        while not done.wait(0.001):
            next(num_ticks)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(tick)
        before = next(num_ticks)
        codec.encode("the quick brown fox " * 50_000, raw=True)
        during = next(num_ticks) - before
        done.set()
    assert during > 10  # with the lock held: one or two


def test_a_text_that_is_too_long_is_refused_before_it_is_tokenised(codec, monkeypatch) -> None:
    long = "the quick brown fox " * 200_000
    assert codec._bound.least_tokens("fox") == 1
    monkeypatch.setattr(codec, "tokenizer", None)  # nothing is asked of it
    for options in ({"raw": True}, {}):
        with pytest.raises(CapacityError, match=r"has 40000\d\d bytes, which are \d+ tokens at least; there is room for 256"):
            codec.encode(long, max_tokens=256, **options)


def test_a_text_that_fits_is_not_refused(codec) -> None:
    text = "the quick brown fox " * 8
    ids = codec.encode(text, raw=True)
    assert codec.encode(text, raw=True, max_tokens=len(ids)) == ids


def long_text_tokenizers() -> dict[str, Tokenizer]:
    byte_level = tokenizer().backend_tokenizer
    composing = Tokenizer.from_str(byte_level.to_str())
    composing.normalizer = normalizers.NFC()
    greedy = Tokenizer.from_str(byte_level.to_str())
    greedy.add_special_tokens([AddedToken("<|wide|>", lstrip=True, rstrip=True)])
    always, first = byte_fallback_tokenizer("▁the", "fox"), byte_fallback_tokenizer("▁the", "fox", scheme="first")
    return {"byte level": byte_level, "NFC": composing, "swallowing": greedy, "always": always, "first": first}


@pytest.mark.parametrize("kind", long_text_tokenizers())
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text() | st.text(" \n", min_size=20) | st.text("the quick brown fox 日ι\u0308\u0301\u1fbe<|wide|>\u212a"))
def test_the_bound_is_never_above_the_number_of_tokens(kind, text) -> None:
    core = BOUNDED[kind]
    bound = LengthBound(core)
    assert bound.least_tokens(text * 50) <= len(core.encode(text * 50, add_special_tokens=False).ids)
    assert bound.least_tokens("fox日" * 100) > 0


BOUNDED = long_text_tokenizers()


def test_white_space_that_a_token_swallows_does_not_count() -> None:
    core = BOUNDED["swallowing"]
    text = "<|wide|>" + " " * 1000
    assert len(core.encode(text).ids) == LengthBound(core).least_tokens(text) == 1


def test_composing_shortens_no_text_below_the_bound() -> None:
    core = BOUNDED["NFC"]
    text = "\u1fbe\u0308\u0301" * 100  # three characters and seven bytes become one of two bytes
    assert len(unicodedata.normalize("NFC", text).encode()) == 200
    assert 0 < LengthBound(core).least_tokens(text) <= len(core.encode(text).ids)


def unbounded() -> dict[str, Tokenizer]:
    byte_level = tokenizer().backend_tokenizer.to_str()
    found = {name: Tokenizer.from_str(byte_level) for name in ("stripped", "replaced", "dropped", "split")}
    found["stripped"].normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    found["replaced"].normalizer = normalizers.Replace("  ", " ")
    found["dropped"].normalizer = normalizers.StripAccents()
    found["split"].pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True))
    return found | {"words": words, "unknown": unknown}


@pytest.mark.parametrize("kind", unbounded())
def test_tokenizers_that_drop_or_merge_text_have_no_bound(kind) -> None:
    assert LengthBound(unbounded()[kind]).least_tokens("x" * 100_000) == 0


def test_bytes_without_a_token_do_not_count() -> None:
    """The model drops them. SmolLM2 has no tokens for some bytes."""
    settings = json.loads(tokenizer().backend_tokenizer.to_str())
    settings["model"]["vocab"] = {token: number for token, number in settings["model"]["vocab"].items() if "Ġ" not in token}
    settings["model"]["merges"] = []
    core = Tokenizer.from_str(json.dumps(settings))
    text = "a fox " * 100
    assert len(core.encode(text).ids) == 400
    assert 0 < LengthBound(core).least_tokens(text) <= 400
    assert LengthBound(core).least_tokens(" " * 1000) == len(core.encode(" " * 1000).ids) == 0


def test_the_alphabet_of_bytes_is_that_of_the_tokenizers() -> None:
    assert set(byte_letters().values()) == set(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in ("a", " ", "\0", "\x7f", "\xad", "é", "日", "\U000f1234"):
        [(spelled, _)] = split.pre_tokenize_str(character)
        assert spelled == "".join(byte_letters()[byte] for byte in character.encode())
