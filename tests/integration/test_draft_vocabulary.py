"""Heads that were trained on some tokens only guess among these, and the bundle records it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medusa_export.bundle.export import export_bundle
from medusa_export.check import validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_heads.errors import CheckpointError
from medusa_heads.formats import load_heads, save_heads
from medusa_runtime import Manifest, MedusaLM, OptionError, open_backend

Make = Callable[..., Path]
KNOWN = list(range(7, 300, 3))  # 98 of 320


def with_vocabulary(heads: Path, target: Path, known: list[int] = KNOWN) -> Path:
    shutil.copytree(heads, target)
    (target / "draft_vocabulary.json").write_text(json.dumps(known))
    return target


def proposals(bundle: Path) -> tuple[np.ndarray, np.ndarray]:
    """The heads' guesses after each token of a prompt, always with the same root, which all heads know. [T, K, M]"""
    backend = open_backend(bundle, Manifest.load(bundle))
    count = 12
    backend.resize(1, count)
    tokens, mask = np.arange(20, 20 + count)[None], np.tri(count, dtype=bool)[None]
    backend.step(tokens, np.arange(count)[None], mask, np.zeros(1, np.int64), np.arange(count)[None])
    found = [backend.propose(np.array([row]), np.array([KNOWN[3]])) for row in range(count)]
    return np.concatenate([one.token_ids for one in found]), np.concatenate([one.log_probs for one in found])


@pytest.mark.parametrize("shared", [True, False])
def test_exported_heads_guess_among_the_tokens_they_know(shared, make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    heads = make_heads(shared_lm_head=shared)
    some = with_vocabulary(heads, tmp_path / "some")
    for name, path in (("all", heads), ("some", some)):
        export_bundle(ExportOptions(str(make_model()), path, tmp_path / f"{name}-bundle"))
    manifest = Manifest.load(tmp_path / "some-bundle")
    assert manifest.heads.draft_vocab_size == len(KNOWN)
    assert Manifest.load(tmp_path / "all-bundle").heads.draft_vocab_size is None
    assert validate(tmp_path / "some-bundle", str(make_model()), heads=some).status == "passed"

    ids, log_probs = proposals(tmp_path / "some-bundle")
    assert set(ids.ravel().tolist()) <= set(KNOWN)
    whole_ids, whole_log_probs = proposals(tmp_path / "all-bundle")
    assert not set(whole_ids.ravel().tolist()) <= set(KNOWN)
    for row, head in np.ndindex(ids.shape[:2]):  # those that both name stand in the same order, and are likelier among fewer
        both = [token for token in whole_ids[row, head] if token in KNOWN]
        assert [token for token in ids[row, head] if token in both] == both
        for token in both:
            few = log_probs[row, head][ids[row, head] == token][0]
            assert few >= whole_log_probs[row, head][whole_ids[row, head] == token][0] - 1e-5

    answers = [
        MedusaLM.from_bundle(tmp_path / f"{name}-bundle").generate("a fox", max_new_tokens=30) for name in ("all", "some")
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_the_full_vocabulary_can_be_asked_for(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    heads = with_vocabulary(make_heads(), tmp_path / "heads")
    export_bundle(ExportOptions(str(make_model()), heads, tmp_path / "bundle", full_head_vocabulary=True))
    assert Manifest.load(tmp_path / "bundle").heads.draft_vocab_size is None
    assert validate(tmp_path / "bundle", str(make_model()), heads=heads).status == "passed"


def test_more_candidates_than_the_heads_know_are_refused(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    heads = with_vocabulary(make_heads(), tmp_path / "heads", known=[4, 5, 6])
    with pytest.raises(
        OptionError, match="--head-top-k is 10, but the heads know only 3 tokens; lower it, or give --full-head-vocab"
    ):
        export_bundle(ExportOptions(str(make_model()), heads, tmp_path / "bundle", head_top_k=10))


def test_whoever_may_read_one_file_of_heads_may_read_all(make_heads: Make, tmp_path: Path) -> None:
    save_heads(load_heads(make_heads()), tmp_path / "copy")
    assert len({path.stat().st_mode for path in (tmp_path / "copy").iterdir()}) == 1


def test_the_vocabulary_is_kept_with_the_heads(make_heads: Make, tmp_path: Path) -> None:
    heads = load_heads(make_heads())
    assert heads.draft_ids is None
    heads.draft_ids = KNOWN
    save_heads(heads, tmp_path / "heads")
    assert load_heads(tmp_path / "heads").draft_ids == KNOWN
    save_heads(heads, tmp_path / "heads", force=True)  # it is heads and nothing else, so it may be replaced


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be used"),
        ("{}", "a list of token ids, each once"),
        ("[]", "must be below the vocabulary size 320"),
        ("[1, 1]", "a list of token ids, each once"),
        ("[1, 320]", "must be below the vocabulary size 320"),
        ('["a"]', "a list of token ids, each once"),
        ("[1.5]", "a list of token ids, each once"),
    ],
)
def test_a_damaged_vocabulary_is_told(text, message, make_heads: Make, tmp_path: Path) -> None:
    heads = tmp_path / "heads"
    shutil.copytree(make_heads(), heads)
    (heads / "draft_vocabulary.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_heads(heads)
