"""Validation against a reference that is known exactly: what is wrong is found, and nothing else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from medusa_export.check import sides, validation
from medusa_export.check.validation_report import ValidationReport
from medusa_export.errors import ValidationMismatchError
from medusa_runtime.backends.base import StepOutput
from medusa_runtime.backends.choosing import Placement
from medusa_runtime.bundle.manifest import DecodingDefaults, GenerationFacts, Manifest, QuantizationFacts, file_facts
from medusa_runtime.errors import BackendError, OptionError
from tests.support.fake_backend import fake_manifest, logits_after
from tests.support.known_model import GREEDY, PROMPTS_READ, TREES_READ, Change, Changed, KnownHeads, Reference, Side, Unsure


@pytest.fixture
def loads() -> list[dict]:
    """The options with which the reference was loaded, each time."""
    return []


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loads: list[dict]) -> Callable[..., ValidationReport]:
    """Validates a bundle whose backend goes wrong in one way."""

    def run(
        change: Change | None = None, quantization: QuantizationFacts | None = None, max_seq_len: int = 200, **settings
    ) -> ValidationReport:
        manifest = fake_manifest(max_seq_len=max_seq_len)
        manifest.quantization = quantization
        for name in ("step.onnx", "heads.onnx", "weights.bin"):
            (tmp_path / name).write_bytes(b"")
            manifest.files[name] = file_facts(tmp_path / name)
        manifest.save(tmp_path)
        monkeypatch.setattr(
            validation.ReferenceSide, "load", lambda *_, **options: loads.append(options) or Reference(manifest)
        )
        monkeypatch.setattr(validation, "BundleSide", lambda _, facts, *rest, **__: Side(Changed(facts, change), rest[1]))
        return validation.validate(tmp_path, "the model", **settings)

    return run


def failed(report: ValidationReport) -> set[str]:
    return {name for name, (passed, _) in report.verdicts().items() if passed is False}


def test_a_bundle_that_is_the_model_passes(validated) -> None:
    report = validated(max_new_tokens=12)
    assert (report.status, failed(report), report.errors) == ("passed", set(), [])
    assert [(row.prompt, row.num_tokens) for row in report.greedy] == [(f"token ids {number}", 12) for number in range(1, 7)]
    assert all(row.plain_vs_reference == [] and row.medusa_vs_plain is None for row in report.greedy)
    assert min(row.tokens_per_step for row in report.greedy) > 1  # it was decoded with Medusa
    rows = [*report.prompt_logits, *report.tree_logits]
    assert [row.what for row in report.prompt_logits[:2]] == ["token ids 1", "token ids 1 in chunks"]
    assert [row.num_rows for row in report.prompt_logits] == [32] * 12
    assert max(row.max_abs for row in rows) == 0
    assert report.verdicts()[GREEDY] == (True, "72 tokens of 6 prompts equal")
    assert report.facts().summary == {
        "max_abs": 0.0, "max_kl": pytest.approx(0, abs=1e-12), "greedy_tokens": 72, "failed_checks": [],
        "skipped_checks": ["head candidates"],
    }  # fmt: skip


def test_decoding_with_medusa_is_compared_with_decoding_without(validated) -> None:
    """Only a step with drafts goes wrong, so plain decoding is what PyTorch gives."""

    def change(output: StepOutput, contexts, is_tree: bool) -> StepOutput:
        if is_tree and output.logits is None:
            return replace(output, greedy_ids=1 + output.greedy_ids % 49)
        return output

    report = validated(change, max_new_tokens=12)
    assert failed(report) == {GREEDY}
    assert report.status == "failed"
    for row in report.greedy:
        assert row.plain_vs_reference == []
        assert row.medusa_vs_plain is not None
        assert (row.medusa_vs_plain.position, row.num_tokens) == (1, 12)  # the first token comes from the prompt


def test_decoding_without_medusa_is_compared_with_the_reference(validated) -> None:
    def change(output: StepOutput, contexts, is_tree: bool) -> StepOutput:
        wrong = [len(context) == 35 for context in contexts]
        return replace(output, greedy_ids=np.where(wrong, 1 + output.greedy_ids % 49, output.greedy_ids))

    report = validated(change, max_new_tokens=6)
    assert failed(report) == {GREEDY}
    for row in report.greedy:
        assert row.medusa_vs_plain is None
        [found] = row.plain_vs_reference
        assert found.position == 3
        assert found.margin == found.reference_logit - found.logit > 0


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("kind", ["one logit", "the distribution", "not finite"])
def test_wrong_logits_of_prompts_and_of_trees_are_told_apart(validated, kind: str, tree: bool) -> None:
    def change(output: StepOutput, contexts, is_tree: bool) -> StepOutput:
        if output.logits is None or is_tree != tree:
            return output
        logits = output.logits.copy()
        if kind == "one logit":
            logits[0, -1, 7] -= 0.006  # the tolerance is 0.005
        if kind == "the distribution":
            logits += 0.0045 * (-1) ** np.arange(logits.shape[-1])  # each logit is within the tolerance
        if kind == "not finite":
            logits[0, -1, 3] = np.nan
        return replace(output, logits=logits)

    report = validated(change, max_new_tokens=6)
    assert failed(report) == {TREES_READ if tree else PROMPTS_READ}
    rows = report.tree_logits if tree else report.prompt_logits
    if kind == "the distribution":
        assert max(row.max_abs for row in rows) < 5e-3


def test_settings_that_the_bundle_lacks_or_the_runtime_does_not_follow_are_told(validated) -> None:
    theirs = GenerationFacts(defaults=DecodingDefaults(repetition_penalty=1.2), ignored={"num_beams": 4})
    with patch.object(Reference, "generation", theirs):
        report = validated(max_new_tokens=6)
    assert failed(report) == {"defaults are those of generation_config.json"}
    assert "repetition_penalty" in (report.generation_mismatch or "")
    assert report.switched_off == {"num_beams": 4}
    assert "without num_beams" in report.verdicts()[GREEDY][1]


def test_a_large_model_is_compared_on_fewer_prompts(validated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "memory_limit", lambda: 19)
    report = validated(max_new_tokens=12)  # its two weights take 8 bytes, which is more than two fifths of the memory
    assert [row.num_tokens for row in report.greedy] == [8, 8]
    assert report.notes[0].startswith("the model is large: 2 of 6 built-in prompts are compared, and 8 new tokens of each")
    monkeypatch.setattr(sides, "memory_limit", lambda: 20)
    assert len(validated(max_new_tokens=12).greedy) == 6


def test_a_prompt_that_cannot_be_used_is_no_failed_check(validated) -> None:
    with pytest.raises(OptionError, match="no prompts"):
        validated(prompts=[])
    with pytest.raises(OptionError, match="tokenizer"):
        validated(prompts=["some text"])


def test_a_step_that_fails_fails_the_bundle_and_is_told(validated) -> None:
    def change(output: StepOutput, contexts, is_tree: bool) -> StepOutput:
        raise BackendError("the device is gone")

    report = validated(change)
    assert report.errors == ["the device is gone"]
    assert {"the bundle runs", PROMPTS_READ, TREES_READ, GREEDY} == failed(report)
    assert report.verdicts()["the bundle runs"] == (False, "the device is gone")


@pytest.mark.parametrize("has_logits", [False, True])
def test_on_a_gpu_a_bundle_that_cannot_be_opened_is_an_error_and_no_failed_check(validated, monkeypatch, has_logits) -> None:
    calls = itertools.count()

    def change(output: StepOutput, contexts, is_tree: bool) -> StepOutput:
        if next(calls) >= (40 if has_logits else 0):
            raise BackendError("out of memory")
        return output

    gpu = Placement("ort-webgpu", "gpu:0", "a test")
    monkeypatch.setattr(validation, "place", lambda *_, **__: gpu)
    monkeypatch.setattr(Placement, "processor", property(lambda _: "a GPU"))
    if has_logits:
        report = validated(change, backend="ort-webgpu")
        assert (report.errors, report.processor, report.targets) == (["out of memory"], "a GPU", ["ort-webgpu"])
    else:
        with pytest.raises(BackendError, match="out of memory"):
            validated(change, backend="ort-webgpu")


def test_a_file_that_differs_fails_whatever_it_computes(validated, tmp_path: Path) -> None:
    def change(output: StepOutput, contexts, is_tree: bool) -> StepOutput:
        return output

    with patch.object(Manifest, "mismatches", lambda *_: ["step.onnx has 3 bytes", "heads.onnx is missing"]):
        report = validated(change, max_new_tokens=6)
    assert failed(report) == {"files match the manifest"}
    assert report.verdicts()["files match the manifest"][1] == "step.onnx has 3 bytes; heads.onnx is missing"


def test_a_report_is_written_shown_and_decides_the_bundles_status(validated, tmp_path: Path, capsys) -> None:
    def change(output: StepOutput, contexts, is_tree: bool) -> StepOutput:
        return replace(output, greedy_ids=1 + output.greedy_ids % 49) if is_tree and output.logits is None else output

    validation.record(tmp_path, validated(max_new_tokens=6))
    assert Manifest.load(tmp_path).validation.status == "passed"
    report = validated(change, max_new_tokens=6)
    with pytest.raises(ValidationMismatchError, match=r"is marked as failed \(greedy: Medusa = plain = PyTorch\)"):
        validation.record(tmp_path, report)
    manifest = Manifest.load(tmp_path)
    assert (manifest.validation.status, manifest.validation.report) == ("failed", "validation.json")
    assert json.loads((tmp_path / "validation.json").read_text()) == json.loads(report.model_dump_json())
    first, shown = report.greedy[0].medusa_vs_plain, capsys.readouterr()
    assert first is not None
    assert (
        f"'token ids 1': Medusa from plain differs at token 1: {first.token_id} (logit {first.logit:.5f}) instead of "
        f"{first.reference_token_id} (logit {first.reference_logit:.5f}), margin {first.margin:.2g}; 1 differences in total"
    ) in shown.out + shown.err


class GivenHeads(SimpleNamespace):
    """Heads from a file, of which only the digest and the vocabulary count here."""

    def digest(self) -> str:
        return self.sha256

    def to(self, dtype: torch.dtype) -> GivenHeads:
        return GivenHeads(**{**vars(self), "dtypes": [*self.dtypes, dtype]})


@pytest.mark.parametrize(
    ("sha256", "draft_ids", "known", "fits"),
    [("a", None, None, True), ("b", None, None, False), ("a", [1, 2], 2, True), ("a", [1, 2], 3, False), ("a", None, 3, False)],
)
def test_only_the_bundles_own_heads_are_compared(sha256, draft_ids, known, fits: bool, monkeypatch) -> None:
    manifest = fake_manifest()
    manifest.precision, manifest.heads.sha256, manifest.heads.draft_vocab_size = "fp16", "a", known
    heads = GivenHeads(sha256=sha256, draft_ids=draft_ids, dtypes=[])
    monkeypatch.setattr(validation, "load_heads", lambda *_: heads)
    checked = []
    monkeypatch.setattr(validation, "require_matching", lambda *found: checked.append(found))
    reference = SimpleNamespace(backbone=SimpleNamespace(dtype=torch.float32))
    if fits:
        found = validation._matching_heads(Path("heads"), manifest, reference)
        assert found.dtypes == [torch.float16, torch.float32]  # rounded as the bundle stores them
    else:
        with pytest.raises(OptionError, match="not those that the bundle was made from"):
            validation._matching_heads(Path("heads"), manifest, reference)
    assert checked == [(heads, reference.backbone, Path("heads"))]


def test_a_reference_of_another_shape_is_refused() -> None:
    manifest = fake_manifest()
    for name in ("architecture", "vocab_size", "hidden_size", "num_layers"):
        other = manifest.model.model_copy(update={name: "Other" if name == "architecture" else 9})
        with pytest.raises(OptionError, match=f"the reference has {name} (Other|9), but the bundle has"):
            validation._require_same_model(manifest, SimpleNamespace(backbone=SimpleNamespace(facts=other)))


def test_code_of_a_checkpoint_runs_only_if_it_is_allowed(validated, loads: list[dict]) -> None:
    validated(max_new_tokens=2)
    validated(max_new_tokens=2, trust_remote_code=True)
    assert [load["trust_remote_code"] for load in loads] == [False, True]


@pytest.mark.parametrize("max_kl", [None, 0.02, 0.05])
def test_a_quantised_bundle_is_compared_with_itself_and_its_distribution_with_the_reference(
    validated, max_kl: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other logits than PyTorch's everywhere, and another token than PyTorch's now and then: that is no defect of it."""

    def change(output: StepOutput, contexts, is_tree: bool) -> StepOutput:
        found = 0.75 * np.array([[logits_after([byte % 256 for byte in context]) for context in contexts]])
        found[..., 7] += 2.0
        greedy_ids = found.argmax(-1)
        return replace(output, greedy_ids=greedy_ids, logits=None if output.logits is None else found)

    quantization = QuantizationFacts(scheme="int8", activation_bits=16, smoothing=0.0, quality={}, max_kl=max_kl)
    monkeypatch.setattr(validation, "_matching_heads", lambda *_: KnownHeads(Unsure()))
    report = validated(change, quantization=quantization, max_new_tokens=6, heads=Path("heads"))
    kl = np.concatenate([[row.mean_kl] * row.num_rows for row in report.from_reference]).mean()
    assert [row.num_rows for row in report.from_reference] == [32] * 6
    assert 0.06 < kl < 0.15
    allowed = 1.0 if max_kl is None else 3 * max_kl
    assert report.allowed_kl == allowed
    assert failed(report) == ({f"mean KL from PyTorch at most {allowed}"} if max_kl == 0.02 else set())
    assert report.head_log_probs == []
    assert report.verdicts()["head candidates"] == (
        None,
        "the heads are quantised, too, so they differ from PyTorch's; the greedy check runs them",
    )
    assert any("the heads are quantised as well" in note for note in report.notes)
    assert max(row.max_abs for row in [*report.prompt_logits, *report.tree_logits]) == 0
    assert not any("quantised" in note for note in validated(max_new_tokens=2).notes)


def test_prompts_and_trees_end_with_the_longest_sequence(validated) -> None:
    """The backend refuses positions beyond it. The bundle's tree is three deep."""
    report = validated(max_seq_len=30, max_new_tokens=2)
    assert (report.status, report.errors) == ("passed", [])
    assert {row.num_rows for row in report.prompt_logits} == {28}
    assert {row.num_rows for row in report.tree_logits} == {2}  # the root, and one node
    assert {row.num_tokens for row in report.greedy} == {2}
    assert {row.num_tokens for row in validated(max_seq_len=30, max_new_tokens=40).greedy} == {15}  # half of it
