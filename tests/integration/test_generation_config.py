"""generation_config.json: what `generate` of Transformers does with it, the bundle does too, or it is told that it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from medusa_export.bundle.export import export_bundle
from medusa_export.check import validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.model.checkpoint import load_backbone
from medusa_export.model.generation_settings import generation_facts, switched_off
from medusa_export.quantize import quantize_bundle
from medusa_heads.errors import CheckpointError
from medusa_runtime import DecodingEngine, DecodingOptions, Manifest
from medusa_runtime.backends.choosing import open_backend
from medusa_runtime.options import with_defaults
from medusa_runtime.text.codec import TextCodec

Make = Callable[..., Path]
PROMPTS = ("the lazy dog learns to speak, while the quick model jumps over many words", "a fox")
NEW_TOKENS = 24


def generated(model: Path, prompt_ids: list[int], **settings: Any) -> list[int]:
    """Greedy decoding by Transformers, with the checkpoint's own generation_config.json."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    tokens = torch.tensor([prompt_ids])
    whole = loaded.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False, **settings
    )
    return whole[0, len(prompt_ids) :].tolist()


def decoded(bundle: Path, prompt_ids: list[int], **fields: Any) -> list[int]:
    """Greedy decoding by the runtime, with the bundle's defaults."""
    manifest = Manifest.load(bundle)
    options = with_defaults(DecodingOptions.of(max_new_tokens=NEW_TOKENS, **fields), manifest.generation)
    steps = DecodingEngine(open_backend(bundle, manifest, "ort-cpu")).generate([prompt_ids], options=options)
    return [token for [step] in steps for token in step.token_ids]


@pytest.fixture
def configured(make_model: Make, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the tiny model whose generation_config.json asks for more."""

    def make(**settings: Any) -> Path:
        model = tmp_path / "model"
        shutil.copytree(make_model(), model)
        path = model / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return model

    return make


@pytest.fixture
def bundle_of(make_bundle: Make, tmp_path: Path) -> Callable[[Path], Path]:
    """Makes the bundle that the export would make of a `configured` model, in less time."""

    def make(model: Path) -> Path:
        shutil.copytree(make_bundle(), tmp_path / "bundle")
        backbone, manifest = load_backbone(str(model)), Manifest.load(tmp_path / "bundle")
        manifest.model, manifest.generation = backbone.facts, generation_facts(backbone)
        manifest.save(tmp_path / "bundle")
        return tmp_path / "bundle"

    return make


@pytest.fixture
def plain(make_model: Make, make_bundle: Make) -> dict[str, tuple[list[int], list[int]]]:
    """Each prompt's ids, and its greedy answer without any such settings."""
    codec = TextCodec(make_bundle())
    return {text: (codec.encode(text), generated(make_model(), codec.encode(text))) for text in PROMPTS}


def export(model: Path, heads: Path, tmp_path: Path) -> Path:
    export_bundle(ExportOptions(str(model), heads, tmp_path / "bundle"))
    return tmp_path / "bundle"


SOME = {"repetition_penalty", "suppress_tokens", "begin_suppress_tokens", "min_new_tokens"}


@pytest.mark.parametrize("names", [*[{name} for name in sorted(SOME)], SOME], ids=lambda names: "+".join(sorted(names)))
def test_the_bundle_decodes_as_generate_does(
    names: set[str],
    configured: Callable[..., Path],
    bundle_of: Callable[[Path], Path],
    make_heads: Make,
    plain: dict[str, tuple[list[int], list[int]]],
    tmp_path: Path,
) -> None:
    answers = [answer for _, answer in plain.values()]
    settings: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "suppress_tokens": sorted({token for answer in answers for token in answer[4:7]}),
        "begin_suppress_tokens": sorted({answer[0] for answer in answers}),
        "min_new_tokens": 20,
    }
    settings = {name: settings[name] for name in sorted(names)}
    eos = answers[0][5:6] if "min_new_tokens" in names else [1]  # so that it would end before
    model = configured(eos_token_id=eos, **settings)
    bundle = export(model, make_heads(), tmp_path) if names == SOME else bundle_of(model)
    facts = Manifest.load(bundle).generation
    assert facts is not None
    assert facts.model_dump(exclude_none=True) == {"defaults": settings, "sampling": {}, "ignored": {}}
    changed = 0
    for prompt_ids, answer in plain.values():
        expected = generated(model, prompt_ids)
        assert decoded(bundle, prompt_ids) == decoded(bundle, prompt_ids, medusa=False) == expected
        changed += expected != answer
    assert changed  # or these settings show nothing
    report = validate(bundle, str(model), prompts=PROMPTS, max_new_tokens=NEW_TOKENS)
    assert report.status == "passed", report.verdicts()
    assert (report.generation, report.switched_off) == (settings, {})
    assert "with the settings of generation_config.json" in report.notes[-1]


def test_a_request_can_do_without_the_defaults(
    configured: Callable[..., Path], bundle_of: Callable[[Path], Path], plain: dict[str, tuple[list[int], list[int]]]
) -> None:
    bundle = bundle_of(configured(repetition_penalty=1.3, suppress_tokens=[9, 10]))
    for prompt_ids, answer in plain.values():
        assert decoded(bundle, prompt_ids, repetition_penalty=1.0, suppress_tokens=[]) == answer


def test_a_bundle_without_the_checkpoints_defaults_fails_its_validation(
    configured: Callable[..., Path], make_bundle: Make
) -> None:
    model = configured(repetition_penalty=1.3)
    report = validate(make_bundle(), str(model), prompts=PROMPTS, max_new_tokens=NEW_TOKENS)
    assert report.status == "failed"
    failed = {name: found for name, (passed, found) in report.verdicts().items() if passed is False}
    assert failed["defaults are those of generation_config.json"] == (
        "generation_config.json asks for repetition_penalty 1.3, the bundle has nothing; export it again"
    )
    assert "greedy: Medusa = plain = PyTorch" in failed


def test_defaults_that_the_checkpoint_does_not_ask_for_fail_too(
    configured: Callable[..., Path], make_model: Make, bundle_of: Callable[[Path], Path]
) -> None:
    bundle = bundle_of(configured(suppress_tokens=[300]))  # which would not have come anyway
    report = validate(bundle, str(make_model()), prompts=PROMPTS, max_new_tokens=NEW_TOKENS)
    assert [name for name, (passed, _) in report.verdicts().items() if passed is False] == [
        "defaults are those of generation_config.json"
    ]


def test_what_the_runtime_does_not_follow_is_told_and_left_out_of_the_comparison(
    configured: Callable[..., Path],
    make_heads: Make,
    plain: dict[str, tuple[list[int], list[int]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = configured(
        no_repeat_ngram_size=1, repetition_penalty=1.3, top_p=0.8, temperature=0.7, typical_p=0.5, do_sample=True
    )
    bundle = export(model, make_heads(), tmp_path)
    assert (
        "generation_config.json: default of every request: repetition_penalty 1.3; "
        "default of requests that sample: top_p 0.8; only recorded: temperature 0.7; "
        "not followed: no_repeat_ngram_size 1, typical_p 0.5"
    ) in capsys.readouterr().err
    facts = Manifest.load(bundle).generation
    assert facts is not None
    assert facts.ignored == {"no_repeat_ngram_size": 1, "typical_p": 0.5}
    differing = 0
    for prompt_ids, _ in plain.values():
        found = decoded(bundle, prompt_ids)
        assert found == generated(model, prompt_ids, no_repeat_ngram_size=0)
        differing += found != generated(model, prompt_ids)
    assert differing  # `generate` does decode otherwise
    report = validate(bundle, str(model), prompts=PROMPTS, max_new_tokens=NEW_TOKENS)
    assert report.status == "passed", report.verdicts()
    assert report.switched_off == {"no_repeat_ngram_size": 1}
    _, found = report.verdicts()["greedy: Medusa = plain = PyTorch"]
    assert found.endswith("prompts equal; without no_repeat_ngram_size, which the runtime does not follow")
    assert "transformers' generate decodes otherwise: it follows no_repeat_ngram_size 1" in report.notes[-1]


def test_a_quantised_bundle_keeps_the_defaults(
    configured: Callable[..., Path], bundle_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    model = configured(repetition_penalty=1.3, begin_suppress_tokens=[9])
    bundle = bundle_of(model)
    quantize_bundle(QuantizeOptions(bundle, tmp_path / "int8", "int8"))
    assert Manifest.load(tmp_path / "int8").generation == Manifest.load(bundle).generation
    report = validate(tmp_path / "int8", str(model), prompts=PROMPTS, max_new_tokens=NEW_TOKENS)
    assert report.status == "passed", report.verdicts()
    assert report.generation == {"repetition_penalty": 1.3, "begin_suppress_tokens": [9]}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"do_sample": True, "use_cache": False, "colour": "red"}, None),
        ({"repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0, "min_length": 0, "num_beams": 1, "temperature": 1.0}, None),
        ({"suppress_tokens": [], "begin_suppress_tokens": []}, None),
        ({"suppress_tokens": [-1, 999]}, None),  # Transformers bans none of them either
        ({"suppress_tokens": [-1, 5]}, {"defaults": {"suppress_tokens": [5]}}),
        ({"repetition_penalty": 2}, {"defaults": {"repetition_penalty": 2.0}}),
        ({"repetition_penalty": 20.0}, {"ignored": {"repetition_penalty": 20.0}}),
        ({"temperature": 0.6, "top_k": 20, "min_p": 0.1}, {"sampling": {"temperature": 0.6, "top_k": 20, "min_p": 0.1}}),
        ({"top_p": 0.0, "temperature": 0.0}, {"ignored": {"top_p": 0.0, "temperature": 0.0}}),
        ({"min_new_tokens": 4, "min_length": 9}, {"defaults": {"min_new_tokens": 4}}),
        ({"min_length": 9, "max_new_tokens": 99}, {"ignored": {"min_length": 9, "max_new_tokens": 99}}),
        ({"forced_eos_token_id": 1, "num_beams": 4}, {"ignored": {"forced_eos_token_id": 1, "num_beams": 4}}),
        (
            {"bad_words_ids": [[4, 5]], "sequence_bias": [[[3], -1.0]]},
            {"ignored": {"bad_words_ids": [[4, 5]], "sequence_bias": [[[3], -1.0]]}},
        ),
    ],
    ids=str,
)
def test_what_becomes_of_each_setting(settings: dict, expected: dict | None, configured: Callable[..., Path]) -> None:
    facts = generation_facts(load_backbone(str(configured(**settings))))
    if expected is None:
        assert facts is None
        return
    assert facts is not None
    assert facts.model_dump(exclude_none=True) == {"defaults": {}, "sampling": {}, "ignored": {}} | expected
    assert set(switched_off(facts)) == set(facts.ignored) - {"top_p", "temperature", "max_new_tokens"}


CHANGES = {
    "encoder_repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "min_length": 30,
    "forced_eos_token_id": 3,
    "exponential_decay_length_penalty": [2, 2.0],
    "num_beams": 3,
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_change_greedy_decoding_and_are_not_followed_are_switched_off(
    name: str, configured: Callable[..., Path], make_bundle: Make
) -> None:
    model = configured(**{name: CHANGES[name]})
    report = validate(make_bundle(), str(model), prompts=PROMPTS, max_new_tokens=NEW_TOKENS)
    assert report.status == "passed", report.verdicts()
    assert report.switched_off == {name: CHANGES[name]}


def test_end_tokens_outside_the_vocabulary_are_left_out_and_told(
    configured: Callable[..., Path], make_heads: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = configured(eos_token_id=[1, 320, -1])
    bundle = export(model, make_heads(), tmp_path)
    assert "end-of-sequence tokens outside the vocabulary of 320: -1, 320; they are left out" in capsys.readouterr().err
    assert Manifest.load(bundle).model.eos_token_ids == [1]


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_damaged_file_is_refused_and_not_ignored(text: str, configured: Callable[..., Path]) -> None:
    model = configured()
    (model / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"generation_config\.json (cannot be read|is damaged)") as told:
        load_backbone(str(model))
    assert "\n" not in str(told.value)
