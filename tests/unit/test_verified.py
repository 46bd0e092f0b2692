"""The draft of each step, as it is told to those who ask for it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from medusa_runtime import CapacityError, DecodingEngine, DynamicTree, GenerationChunk, MedusaLM, TextCodec
from medusa_runtime.drafting.ngrams import NGrams
from tests.support.fake_backend import FakeBackend, fake_manifest, greedy
from tests.support.text import byte_fallback_tokenizer, saved_codec
from tests.unit.test_service import LetterCodec


def chunks_of(skill: str, tree=None, ngrams=None, **fields) -> list[GenerationChunk]:
    backend = FakeBackend(skill, fake_manifest(max_seq_len=300))
    with MedusaLM(DecodingEngine(backend, tree, ngrams=ngrams), LetterCodec()) as lm:
        return list(lm.stream("abc", max_new_tokens=30, **fields))


@pytest.mark.parametrize("skill", ["never", "sometimes", "always"])
@pytest.mark.parametrize("tree", [None, DynamicTree(6)])
def test_a_draft_holds_the_tokens_that_were_given_out(skill: str, tree: DynamicTree | None) -> None:
    first, *others = chunks_of(skill, tree, drafts=True)
    assert first.draft is None
    told = list(first.token_ids)
    for chunk in others:
        draft = chunk.draft
        assert draft is not None
        assert (draft.token_ids[0], draft.parents[0], draft.depths[0], draft.sources[0]) == (told[-1], -1, 0, "model")
        assert draft.accepted[0] == 0
        assert len(draft.accepted) == 1 + chunk.num_accepted
        assert [draft.token_ids[node] for node in draft.accepted[1:]] == chunk.token_ids[: chunk.num_accepted]
        assert [draft.parents[node] for node in draft.accepted[1:]] == draft.accepted[:-1]
        for node in range(1, len(draft.token_ids)):
            parent = draft.parents[node]
            assert draft.depths[node] == draft.depths[parent] + 1
            assert 0 < draft.probabilities[node] <= draft.probabilities[parent] * (1 + 1e-6)
            assert draft.sources[node] == "head"
        told += chunk.token_ids
    assert told == greedy([0, 1, 2], 30)
    assert any(chunk.num_accepted for chunk in others) == (skill != "never")


def test_nobody_is_told_who_does_not_ask() -> None:
    assert all(chunk.draft is None for chunk in chunks_of("always"))


def test_plain_decoding_verifies_a_root_alone() -> None:
    first, *others = chunks_of("always", drafts=True, medusa=False)
    assert first.draft is None
    assert {tuple(chunk.draft.sources) for chunk in others if chunk.draft} == {("model",)}


def test_prompt_lookup_and_ngrams_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support import fake_backend

    monkeypatch.setattr(fake_backend, "next_token", fake_backend.repeating_token)
    looked_up = chunks_of("never", drafts=True, prompt_lookup=True, medusa=False)
    sources = {source for chunk in looked_up if chunk.draft for source in chunk.draft.sources[1:]}
    assert sources == {"lookup"}
    for bias, names in ((0, {"head"}), (-5, {"head", "ngrams"})):  # of all other tokens, whose loss is the candidates' gain
        ngrams = NGrams(np.zeros(256, np.uint16), np.array([[1, 0, 0, 1, bias]] * 3, np.float32))
        drafts = [chunk.draft for chunk in chunks_of("sometimes", DynamicTree(6), ngrams, drafts=True)]
        assert {source for draft in drafts if draft for source in draft.sources[1:]} == names


def byte_level(*merges: str) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*letters, *(merge.replace(" ", "") for merge in merges)])}
    core = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|call|>", normalized=False)])
    return core


@pytest.mark.parametrize("core", [byte_level("t h", "Ġ th"), byte_fallback_tokenizer("the", "▁the", scheme="first")])
@pytest.mark.parametrize("text", ["a the thé 🤖 ☂", "日本 the"])
def test_the_bytes_of_tokens_are_those_of_the_text(tmp_path: Path, core: Tokenizer, text: str) -> None:
    codec = saved_codec(tmp_path, None, core=core)
    ids = core.encode(text, add_special_tokens=False).ids
    assert b"".join(codec.token_bytes(token) for token in ids).decode().strip() == text
    assert codec.token_bytes(10**6) == b""


def test_special_tokens_are_told_if_asked_for(tmp_path: Path) -> None:
    core = byte_level("t h")
    codec: TextCodec = saved_codec(tmp_path, None, core=core)
    special = core.token_to_id("<|call|>")
    ids = [*core.encode("the ").ids, special, *core.encode("é").ids]
    assert codec.decode(ids) == "the é"
    assert codec.decode(ids, skip_special_tokens=False) == "the <|call|>é"
    assert codec.token_bytes(special) == b"<|call|>"


def test_special_tokens_of_byte_fallback_are_told_if_asked_for(tmp_path: Path) -> None:
    core = byte_fallback_tokenizer("the")
    codec = saved_codec(tmp_path, None, core=core)
    ids = [core.token_to_id(token) for token in ("the", "<s>", "<0xF0>")]
    assert codec.decode(ids) == "the\N{REPLACEMENT CHARACTER}"
    assert codec.decode(ids, skip_special_tokens=False) == "the<s>\N{REPLACEMENT CHARACTER}"


def test_a_prompt_longer_than_allowed_is_refused(make_bundle) -> None:
    with MedusaLM.from_bundle(make_bundle()) as lm:
        num_tokens = len(lm.submit("the quick brown fox", max_new_tokens=1).prompt_ids)
        assert lm.generate("the quick brown fox", max_new_tokens=1, max_prompt_tokens=num_tokens).token_ids
        with pytest.raises(CapacityError, match=f"the prompt has {num_tokens} tokens; there is room for {num_tokens - 1}"):
            lm.generate("the quick brown fox", max_new_tokens=1, max_prompt_tokens=num_tokens - 1)


def test_probabilities_are_no_more_than_one() -> None:
    for chunk in chunks_of("always", drafts=True)[1:]:
        assert chunk.draft is not None
        assert all(0 <= one <= 1 and math.isfinite(one) for one in chunk.draft.probabilities)
