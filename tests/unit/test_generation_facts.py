"""A bundle's defaults from generation_config.json, and ids that are outside the vocabulary."""

from __future__ import annotations

import json

import pytest

from medusa_runtime import BundleError, DecodingEngine, DecodingOptions, Manifest, OptionError
from medusa_runtime.bundle.manifest import DecodingDefaults, GenerationFacts, SamplingDefaults
from medusa_runtime.options import with_defaults
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend, fake_manifest, greedy

FILES = ("weights.bin", "step.onnx", "heads.onnx", "tokenizer.json", "chat.json")
PROMPT = [3, 1, 4]


@pytest.fixture
def data() -> dict:
    """A manifest as JSON."""
    manifest = fake_manifest().model_dump(exclude_none=True)
    return manifest | {"files": {name: {"size": 1, "sha256": ""} for name in FILES}}


def load(directory, data: dict) -> Manifest:
    (directory / "manifest.json").write_text(json.dumps(data))
    return Manifest.load(directory)


def test_defaults_read_back_as_they_were_written(tmp_path, data) -> None:
    facts = GenerationFacts(
        defaults=DecodingDefaults(repetition_penalty=1.3, suppress_tokens=[4]),
        sampling=SamplingDefaults(top_p=0.9),
        ignored={"no_repeat_ngram_size": 3, "bad_words_ids": [[1, 2]]},
    )
    manifest = load(tmp_path, data)
    assert manifest.generation is None
    manifest.generation = facts
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path).generation == facts


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"defaults": {"repetition_penalty": 0}}, "generation.defaults.repetition_penalty: Input should be greater than 0"),
        ({"defaults": {"repetition_penalty": 11}}, "less than or equal to 10"),
        ({"defaults": {"suppress_tokens": [VOCAB_SIZE]}}, "the token 50 is outside the vocabulary of 50"),
        ({"defaults": {"begin_suppress_tokens": [0, -1]}}, "the token -1 is outside the vocabulary of 50"),
        ({"defaults": {"temperature": 1}}, "generation.defaults.temperature"),
        ({"sampling": {"top_p": 0}}, "generation.sampling.top_p"),
        ({"surprise": 1}, "generation.surprise"),
    ],
)
def test_damaged_defaults_are_refused_in_one_line(generation, message, tmp_path, data) -> None:
    with pytest.raises(BundleError, match=message) as told:
        load(tmp_path, data | {"generation": generation})
    assert len(str(told.value).splitlines()) == 1


def test_the_ranges_of_defaults_are_those_of_the_options() -> None:
    fields = DecodingDefaults.model_fields | SamplingDefaults.model_fields
    del fields["temperature"]  # which must not be 0: that would be no sampling
    for name, field in fields.items():
        assert field.metadata == DecodingOptions.model_fields[name].metadata
    assert len(fields) == 7


def test_an_old_bundles_end_tokens_outside_the_vocabulary_are_left_out(tmp_path, data) -> None:
    data["model"]["eos_token_ids"] = [-1, 7, VOCAB_SIZE, 0, VOCAB_SIZE - 1]
    manifest = load(tmp_path, data)
    assert manifest.model.eos_token_ids == [7, 0, VOCAB_SIZE - 1]


@pytest.mark.parametrize("outside", [VOCAB_SIZE, -1])
def test_end_tokens_outside_the_vocabulary_neither_fail_nor_ban_another(outside, tmp_path, data) -> None:
    last = VOCAB_SIZE - 1
    prompt = next([first, 2] for first in range(VOCAB_SIZE) if last in greedy([first, 2], 12))  # -1 would ban the last token
    data["model"]["eos_token_ids"] = [outside]
    engine = DecodingEngine(FakeBackend(manifest=load(tmp_path, data)))
    steps = engine.generate([prompt], 12, min_new_tokens=12)
    assert [token for [step] in steps for token in step.token_ids] == greedy(prompt, 12)


@pytest.mark.parametrize("name", ["suppress_tokens", "begin_suppress_tokens", "stop_token_ids"])
@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_token_ids_outside_the_vocabulary_are_refused(name, token) -> None:
    with pytest.raises(OptionError, match=f"{name} names the token {token}; the vocabulary has {VOCAB_SIZE}"):
        DecodingEngine(FakeBackend()).generate([PROMPT], 4, **{name: [2, token]})


@pytest.mark.parametrize("skill", ["never", "sometimes", "always"])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_suppressed_tokens_are_never_given_out_with_medusa_or_without(skill, temperature) -> None:
    plain = greedy(PROMPT, 30)
    facts = GenerationFacts(
        defaults=DecodingDefaults(suppress_tokens=sorted(set(plain[3:6])), begin_suppress_tokens=[plain[0]])
    )
    answers = []
    for medusa in (True, False):
        options = with_defaults(DecodingOptions.of(max_new_tokens=30, medusa=medusa, temperature=temperature, seed=1), facts)
        steps = DecodingEngine(FakeBackend(skill)).generate([PROMPT], options=options)
        answers.append([token for [step] in steps for token in step.token_ids])
    assert answers[0] == answers[1]
    assert not set(answers[0]) & set(plain[3:6])
    assert answers[0][0] != plain[0]
