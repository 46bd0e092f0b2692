"""Heads on disk: files from elsewhere are refused in one line, before they cost time or memory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from medusa_export.bundle.default_tree import tree_for
from medusa_heads.config import HeadsConfig
from medusa_heads.errors import CheckpointError
from medusa_heads.formats import load_heads, native, save_heads
from medusa_heads.modules import MedusaHeads
from medusa_heads.replay import Evaluation

CONFIG = HeadsConfig(base_model="x", num_heads=2, hidden_size=4, vocab_size=8)


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    save_heads(MedusaHeads(CONFIG), tmp_path / "heads")
    return tmp_path / "heads"


def test_files_of_earlier_versions_keep_their_digest_and_config(heads: Path) -> None:
    fields = (
        "format_version",
        "base_model",
        "num_heads",
        "num_layers",
        "hidden_size",
        "vocab_size",
        "shared_lm_head",
        "reads_root",
    )
    assert tuple(json.loads((heads / "config.json").read_text())) == fields  # which earlier versions can read as well
    whole = hashlib.sha256()
    for name, tensor in sorted(load_file(heads / "heads.safetensors").items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert load_heads(heads).digest() == whole.hexdigest()


def test_what_decides_the_guesses_is_in_the_digest() -> None:
    scaled = MedusaHeads(CONFIG.model_copy(update={"shared_lm_head": False, "logit_scale": 0.5}))
    plain = MedusaHeads(CONFIG.model_copy(update={"shared_lm_head": False}))
    plain.load_state_dict(scaled.state_dict())
    assert plain.digest() != scaled.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 0},
        {"one_lm_head": True},
        {"shared_lm_head": False, "vocab_size": None},
        {"shared_lm_head": False, "reads_root": True, "kind": "hydra"},
        {"shared_lm_head": False, "draft_rows": True, "kind": "hydra"},
        {"reads_root": True, "one_block": True, "num_layers": 2},
        {"kind": "other"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(heads: Path, changes: dict[str, Any]) -> None:
    (heads / "config.json").write_text(json.dumps(CONFIG.model_dump() | changes), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: ") as caught:
        load_heads(heads)
    assert "\n" not in str(caught.value)


def test_lm_heads_for_a_draft_vocabulary_need_it(heads: Path) -> None:
    changed = CONFIG.model_dump() | {"shared_lm_head": False, "draft_rows": True}
    (heads / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"lack draft_vocabulary\.json"):
        load_heads(heads)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "damaged or incomplete: it is nested too deeply"),
        ("9" * 5000, "damaged or incomplete: Exceeds the limit"),
        (json.dumps(CONFIG.model_dump() | {"num_heads": 10**9}), "config.json: num_heads: "),
        (json.dumps(CONFIG.model_dump() | {"num_layers": 10**9}), "config.json: num_layers: "),
        (json.dumps(CONFIG.model_dump() | {"hidden_size": 10**30}), "config.json: hidden_size: "),
        (json.dumps(CONFIG.model_dump() | {"a\nb": 1}), "config.json: a b: "),
        ("[]", "config.json: "),
    ],
)
def test_another_config_is_refused_in_one_line(heads: Path, text: str, message: str) -> None:
    (heads / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_heads(heads)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{}", "[1.0]"])
def test_another_draft_vocabulary_is_refused_in_one_line(heads: Path, text: str) -> None:
    (heads / "draft_vocabulary.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"draft_vocabulary\.json cannot be used: ") as caught:
        load_heads(heads)
    assert "\n" not in str(caught.value)


def test_an_evaluation_with_a_tree_that_is_none_is_damaged(heads: Path) -> None:
    tree = {"nodes": 4, "tokens_per_step": 1.5, "expected": 1.5, "tree": {}}
    facts = Evaluation(heads="", base_model="", data="", answers=1, tokens=1, accuracy=[[0.5]], trees=[tree]).model_dump()
    (heads / native.EVALUATION_NAME).write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged"):
        tree_for(heads, "", num_heads=2, top_k=2, num_nodes=4)


def test_what_a_killed_run_left_keeps_no_heads_from_being_replaced(heads: Path) -> None:
    (heads / ".draft_ngrams.npz.partial-0123456789abcdef").write_bytes(b"")
    assert native.is_alone(heads)
    (heads / "thesis.txt").write_bytes(b"")
    assert not native.is_alone(heads)
