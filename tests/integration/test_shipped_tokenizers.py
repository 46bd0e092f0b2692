"""The tokenizer file of a checkpoint is what a bundle holds and what prompts are encoded with, whatever its class would do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from medusa_export.bundle.export import export_bundle
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.model.tokenizer import (
    HARD_TEXTS,
    check_vocabulary,
    difference,
    has_tokenizer,
    load_tokenizer,
    write_tokenizer,
)
from medusa_heads.errors import CheckpointError
from medusa_runtime import MedusaLM

Make = Callable[..., Path]
TEXT = "The QUICK brown fox"


def _model(source: Path, directory: Path, *, tokenizer_class: str, **settings: object) -> Path:
    """A checkpoint whose tokenizer.json has a normaliser and a prefix space of its own, written without indentation."""
    shutil.copytree(source, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": tokenizer_class} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "PreTrainedTokenizerFast"])
def test_the_file_is_used_and_shipped(tokenizer_class: str, make_model: Make, tmp_path: Path) -> None:
    model = _model(make_model(), tmp_path / "model", tokenizer_class=tokenizer_class)
    told: list[str] = []
    tokenizer = load_tokenizer(str(model), tell=told.append)
    own = Tokenizer.from_file(str(model / "tokenizer.json"))
    for text in (TEXT, *HARD_TEXTS):
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False).ids
    write_tokenizer(tokenizer, str(model), tmp_path / "written.json")
    assert (tmp_path / "written.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    if tokenizer_class in {"GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer"}:
        assert len(told) == 1
        assert told[0].startswith(f"tokenizer.json and {tokenizer_class}")
        assert "give different tokens for 'Hello world'" in told[0]
    else:
        assert told == []


def test_a_class_of_a_model_type_is_no_exception(make_model: Make, tmp_path: Path) -> None:
    model = _model(make_model("qwen2"), tmp_path / "model", tokenizer_class="PreTrainedTokenizerFast")
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    own = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert load_tokenizer(str(model)).encode(TEXT, add_special_tokens=False) == own.encode(TEXT, add_special_tokens=False).ids


def test_tokens_of_the_configuration_alone_are_kept(make_model: Make, tmp_path: Path) -> None:
    added = {"320": {"content": "<|tool|>", "special": True, "lstrip": False, "rstrip": False, "single_word": False,
                     "normalized": False}}  # fmt: skip
    model = _model(make_model(), tmp_path / "model", tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder=added)
    told: list[str] = []
    tokenizer = load_tokenizer(str(model), tell=told.append)
    write_tokenizer(tokenizer, str(model), tmp_path / "written.json")
    shipped = Tokenizer.from_file(str(tmp_path / "written.json"))
    assert shipped.encode("<|tool|>", add_special_tokens=False).ids == [320]
    assert shipped.get_added_tokens_decoder()[320].special
    own = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert shipped.encode(TEXT).ids == own.encode(TEXT).ids
    assert "1 tokens of tokenizer_config.json are added to tokenizer.json, such as '<|tool|>'" in told
    check_vocabulary(tokenizer, 320, "m", told.append)
    assert told[-1].startswith("the tokenizer of m has 1 tokens beyond the model's vocabulary of 320, such as '<|tool|>' (320)")


def test_a_difference_names_the_text_and_the_place() -> None:
    one, other = (Tokenizer.from_str(_words()) for _ in range(2))
    assert difference(one, other) is None
    other.add_tokens([AddedToken("world")])
    assert difference(one, other) == "for 'Hello world': ['[UNK]'] and ['world'] at token 1"


def _words() -> str:
    vocab = {"[UNK]": 0, "Hello": 1}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    return json.dumps({"version": "1.0", **parts, "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model})


def test_a_bundle_encodes_as_the_file(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    model = _model(make_model(), tmp_path / "model", tokenizer_class="GPT2Tokenizer")
    export_bundle(ExportOptions(str(model), make_heads(), tmp_path / "bundle"))
    assert (tmp_path / "bundle" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    with MedusaLM.from_bundle(tmp_path / "bundle") as lm:
        own = Tokenizer.from_file(str(model / "tokenizer.json"))
        assert lm.codec.encode(TEXT, raw=True) == own.encode(TEXT).ids


def test_a_damaged_file_is_told(make_model: Make, tmp_path: Path) -> None:
    model = shutil.copytree(make_model(), tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(str(model))


def test_a_model_may_have_no_tokenizer(make_model: Make, tmp_path: Path) -> None:
    model = shutil.copytree(make_model(), tmp_path / "model")
    assert has_tokenizer(str(model))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    assert not has_tokenizer(str(model))
