"""Validation against a reference that is known exactly: what is wrong is found, and nothing else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch

from medusa_export.check import quality, sides, validation
from medusa_export.check.compare import divergences, first_divergence, log_softmax, logits_difference
from medusa_export.check.sides import BundleSide, ReferenceSide
from medusa_export.check.validation_report import (
    BF16_ON_GPU,
    QUANTIZED,
    QUANTIZED_TO_8_BITS,
    TOLERANCES,
    Divergence,
    GreedyComparison,
    LogitsDifference,
    Tolerance,
    ValidationReport,
    tolerance,
)
from medusa_export.errors import ValidationMismatchError
from medusa_heads.errors import CheckpointError
from medusa_runtime.backends.base import HeadOutput, StepOutput
from medusa_runtime.backends.choosing import Placement
from medusa_runtime.bundle.manifest import (
    DecodingDefaults,
    GenerationFacts,
    GraphFacts,
    Manifest,
    QuantizationFacts,
    file_facts,
)
from medusa_runtime.errors import BackendError, BundleError, OptionError
from tests.support.fake_backend import FakeBackend, fake_manifest, logits_after

GREEDY = "greedy: Medusa = plain = PyTorch"
PROMPTS_READ, TREES_READ = "logits of prompts, whole and in chunks", "logits of tree paths"
Change = Callable[[StepOutput, Sequence[Sequence[int]], bool], StepOutput]


class Changed(FakeBackend):
    """A backend that goes wrong where `change` says so: given a step's output, its contexts, and whether it reads a tree."""

    def __init__(self, manifest: Manifest, change: Change | None = None) -> None:
        super().__init__("sometimes", manifest)
        self.change = change

    def step(self, input_ids, position_ids, tree_mask, cache_lengths, *rest, **options) -> StepOutput:
        output = super().step(input_ids, position_ids, tree_mask, cache_lengths, *rest, **options)
        if self.change is None:
            return output
        is_tree = not np.array_equal(tree_mask[0], np.tri(tree_mask.shape[1], dtype=bool))
        return self.change(output, self.contexts[0], is_tree)


class Side(BundleSide):
    """The bundle's side, with a backend that is made up."""

    def __init__(self, backend: FakeBackend, target: str) -> None:
        self.backend, self.target = backend, target
        self._last_row, self._root_id = 0, 0


class Reference:
    """Stands for PyTorch: the model that the backend has."""

    generation: GenerationFacts | None = None

    def __init__(self, manifest: Manifest) -> None:
        self.backbone = SimpleNamespace(facts=manifest.model, model=torch.nn.Linear(1, 1))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        return np.stack([logits_after(list(token_ids[:stop])) for stop in range(1, len(token_ids) + 1)])

    def path_logits(self, prompt_ids, paths):
        return [self.logits([*prompt_ids, *path])[len(prompt_ids) :] for path in paths]

    def processed(self, prompt_ids, answer_ids, rows):
        return rows


@pytest.fixture
def loads() -> list[dict]:
    """The options with which the reference was loaded, each time."""
    return []


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loads: list[dict]) -> Callable[..., ValidationReport]:
    """Validates a bundle whose backend goes wrong in one way."""

    def run(change: Change | None = None, quantization: QuantizationFacts | None = None, **settings) -> ValidationReport:
        manifest = fake_manifest()
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
    return {name for name, (passed, _) in report.verdicts().items() if not passed}


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


def test_a_quantised_bundles_distribution_may_be_off_by_its_limit() -> None:
    def report(*divergences: float) -> ValidationReport:
        rows = [
            LogitsDifference(what="", num_rows=1 + place, max_abs=9.0, min_cosine=0.5, max_kl=9.0, mean_kl=mean)
            for place, mean in enumerate(divergences)
        ]
        return ValidationReport(
            reference="", backend="", precision="fp32", quantization="int8", tolerance=QUANTIZED, allowed_kl=0.5,
            from_reference=rows, provenance=fake_manifest().provenance,
        )  # fmt: skip

    name = "mean KL from PyTorch at most 0.5"
    assert report(0.9, 0.3).verdicts()[name] == (True, "0.5000 nats over 3 rows")  # of three rows, one has 0.9
    assert report(0.9, 0.31).verdicts()[name][0] is False
    assert report().verdicts()[name] == (False, "not compared")


WITHIN = Tolerance(max_abs=1.0, max_kl=0.1, tie_margin=0.2)


@pytest.mark.parametrize(
    ("max_abs", "max_kl", "expected"),
    [(1.0, 0.1, True), (1.1, 0.0, False), (0.0, 0.11, False), (float("nan"), 0.0, False), (0.0, float("nan"), False)],
)
def test_rows_agree_if_logits_and_distributions_do(max_abs: float, max_kl: float, expected: bool) -> None:
    difference = LogitsDifference(what="", num_rows=1, max_abs=max_abs, min_cosine=1.0, max_kl=max_kl)
    assert difference.within(WITHIN) is expected


@pytest.mark.parametrize(
    ("plain", "medusa", "expected"),
    [([], None, True), ([0.2], 0.2, True), ([0.1, 0.3], None, False), ([], 0.3, False), ([], float("inf"), False)],
)
def test_tokens_agree_if_they_differ_only_between_nearly_equal_logits(plain, medusa, expected: bool) -> None:
    def divergence(margin: float) -> Divergence:
        return Divergence(position=0, token_id=1, reference_token_id=2, logit=0, reference_logit=margin, margin=margin)

    row = GreedyComparison(
        prompt="",
        num_tokens=3,
        plain_vs_reference=[divergence(margin) for margin in plain],
        medusa_vs_plain=None if medusa is None else divergence(medusa),
        tokens_per_step=1.0,
    )
    assert row.within(WITHIN) is expected


def test_the_tolerance_is_that_of_the_precision_and_the_device() -> None:
    assert tolerance("fp32", activation_bits=None, on_gpu=False) == TOLERANCES["fp32"]
    assert tolerance("bf16", activation_bits=None, on_gpu=False) == TOLERANCES["bf16"]
    assert tolerance("bf16", activation_bits=None, on_gpu=True) == BF16_ON_GPU
    assert tolerance("fp16", activation_bits=None, on_gpu=True) == TOLERANCES["fp16"]
    assert tolerance("fp32", activation_bits=16, on_gpu=False) == QUANTIZED
    assert tolerance("fp32", activation_bits=8, on_gpu=False) == QUANTIZED_TO_8_BITS
    assert tolerance("fp32", activation_bits=8, on_gpu=True) == QUANTIZED
    for known in (*TOLERANCES.values(), BF16_ON_GPU, QUANTIZED, QUANTIZED_TO_8_BITS):
        assert min(known.max_abs, known.max_kl, known.tie_margin) > 0


def test_the_difference_of_rows_is_known_exactly() -> None:
    reference = np.log([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]])
    found = np.log([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])
    difference = logits_difference("rows", found, reference)
    assert difference.max_abs == pytest.approx(np.log(2))
    assert difference.max_kl == pytest.approx(0.25 * np.log(2))
    assert difference.mean_kl == pytest.approx(0.125 * np.log(2))
    cosine = (2 * np.log(0.5) * np.log(0.25) + np.log(0.25) ** 2) / (np.log(0.5) ** 2 + 2 * np.log(0.25) ** 2)
    assert difference.min_cosine == pytest.approx(cosine)
    assert difference.num_rows == 2


def test_rows_are_compared_block_by_block_with_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    found, reference = rng.normal(size=(2, 7, 5))
    whole = logits_difference("rows", found, reference)
    for size in (1, 5, 10, 34, 35):
        monkeypatch.setattr("medusa_export.check.compare.BLOCK_ELEMENTS", size)
        parts = logits_difference("rows", found, reference)
        assert parts.model_dump() == pytest.approx(whole.model_dump())


def test_answers_of_different_lengths_differ_at_the_end_of_the_shorter() -> None:
    reference = np.eye(4)
    found = first_divergence([0, 1], [0, 1, 2], reference)
    assert found is not None
    assert (found.position, found.margin) == (1, float("inf"))
    first = first_divergence([0, 2, 2], [0, 1, 2], reference)
    assert first is not None
    assert (first.position, first.token_id, first.reference_token_id, first.logit, first.reference_logit) == (1, 2, 1, 0, 1)
    assert [row.position for row in divergences([0, 2, 2, 0], reference)] == [1, 3]


def test_a_number_that_is_not_finite_is_found_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_export.check.compare.BLOCK_ELEMENTS", 3)  # one row each
    for row in range(3):
        found = np.zeros((3, 3))
        found[row, 1] = np.nan
        difference = logits_difference("rows", found, np.zeros((3, 3)))
        assert (difference.max_abs, difference.max_kl, difference.mean_kl) == (np.inf, np.inf, np.inf)
        assert (difference.num_rows, difference.min_cosine) == (3, -1.0)


@pytest.mark.parametrize("chunk", [3, 4, 100])
def test_the_loss_of_quality_is_known_exactly(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "CHUNK", chunk)
    texts = [[1, 7, 3, 9, 4, 2, 8], [5, 6, 4, 3]]

    class Sharper:
        """Gives the original's logits: those of the backend times 1.5, and one that is always larger."""

        def rows(self, text, start: int, stop: int) -> np.ndarray:
            logits = np.stack([1.5 * logits_after(list(text[: place + 1])) for place in range(start, stop)])
            logits[:, 3] += 2.0
            return logits

    found = quality.compare(Sharper(), FakeBackend(), texts)
    rows = [(text, place) for text in texts for place in range(len(text))]
    old = np.concatenate([log_softmax(Sharper().rows(text, place, place + 1)) for text, place in rows])
    new = np.stack([log_softmax(logits_after(text[: place + 1])) for text, place in rows])
    followed = [(row, text[place + 1]) for row, (text, place) in enumerate(rows) if place + 1 < len(text)]
    kl = (np.exp(old) * (old - new)).sum(-1)
    assert (found.num_tokens, found.tokens_per_step, found.tokens_per_step_before) == (11, 0.0, None)
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-5)
    assert found.max_kl == pytest.approx(kl.max(), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(-np.mean([new[place] for place in followed])), rel=1e-5)
    assert found.perplexity_before == pytest.approx(np.exp(-np.mean([old[place] for place in followed])), rel=1e-5)
    same = (old.argmax(-1) == new.argmax(-1)).mean()
    assert 0 < same < 1
    assert found.same_greedy == pytest.approx(same)


def settling(*passes: float) -> tuple[ReferenceSide, list[list[int]]]:
    """A reference whose passes give these logits, and the tokens of each."""
    backbone = SimpleNamespace(facts=SimpleNamespace(vocab_size=20), max_seq_len=30, source="the model")
    side, asked = ReferenceSide(backbone), []

    def logits(token_ids: list[int]) -> np.ndarray:
        asked.append(token_ids)
        return np.full((1, 3), passes[len(asked) - 1])

    side.logits = logits  # type: ignore[method-assign]
    return side, asked


def test_a_reference_is_used_once_two_passes_agree() -> None:
    for passes in ((1.0, 1.0), (1.0, 2.0, 2.0), (1.0, 2.0, 3.0, 4.0, 5.0, 5.0)):
        side, asked = settling(*passes)
        side.settle()
        assert asked == [[*range(20), *range(10)]] * len(passes)


def test_a_reference_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(CheckpointError, match="different logits for the model at every pass"):
        settling(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)[0].settle()
    with pytest.raises(CheckpointError, match="NaN or infinite logits for the model"):
        settling(float("nan"), float("nan"))[0].settle()


class Unsure(FakeBackend):
    """Its heads' probabilities of a depth add up to less than 1."""

    def propose(self, rows, root_ids) -> HeadOutput:
        found = super().propose(rows, root_ids)
        return HeadOutput(found.token_ids, found.log_probs - np.float32(np.log(2)))


class KnownHeads:
    """Heads whose probabilities are the backend's, as PyTorch would compute them. Some tokens may be unknown to them."""

    draft_ids = None

    def __init__(self, backend: Unsure) -> None:
        self.backend = backend

    def __call__(self, hidden, lm_head, root_ids, embedding, guesses) -> torch.Tensor:
        found = Unsure.propose(self.backend, np.array([len(self.backend.contexts[0]) - 1]), root_ids.numpy())
        ids, chances = torch.from_numpy(found.token_ids), torch.from_numpy(found.log_probs).exp()
        assert guesses.tolist() == found.token_ids[:, :-1, 0].tolist()
        rest = (1 - chances.sum(-1, keepdim=True)) / (50 - ids.shape[-1])
        return rest.repeat(1, 1, 50).scatter(-1, ids, chances).log()


@pytest.mark.parametrize("kind", ["right", "a probability", "another token"])
def test_the_heads_candidates_are_compared(kind: str) -> None:
    class Wrong(Unsure):
        def propose(self, rows, root_ids):
            found = super().propose(rows, root_ids)
            if kind == "a probability":
                found.log_probs[0, 1, 2] -= 0.25
            if kind == "another token":
                found.token_ids[0, 2, 3] = min(set(range(1, 50)) - set(found.token_ids[0, 2].tolist()))
            return found

    backend = Wrong()
    side, heads = Side(backend, "portable"), KnownHeads(backend)
    model = SimpleNamespace(get_output_embeddings=lambda: None, get_input_embeddings=lambda: None)
    torch_side = SimpleNamespace(backbone=SimpleNamespace(model=model), hidden=lambda prompt_ids: None)
    difference = validation._compare_heads([3, 1, 4], side, torch_side, heads)
    assert (difference.what, difference.num_rows) == ("heads", 3)
    if kind == "right":
        assert difference.max_abs < 1e-5
    elif kind == "a probability":
        assert difference.max_abs == pytest.approx(0.25, rel=1e-3)
    else:  # the fourth candidate has 0.3 / 8 / 2, and each of the other 46 tokens an equal part of what the four leave
        assert difference.max_abs == pytest.approx(np.log(0.01875 / ((1 - 0.28125) / 46)), rel=1e-3)


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


def graphs(*targets: str) -> dict[str, GraphFacts]:
    step = fake_manifest().graphs["step"]
    return {f"step.{target}": step.model_copy(update={"target": target}) for target in targets}


@pytest.mark.parametrize(
    ("targets", "backend", "expected"),
    [
        (("portable",), "ort-cpu", [("portable", 1)]),
        (("portable", "ort-cpu"), "ort-cpu", [("ort-cpu", 2), ("portable", 1)]),
        (("portable", "ort-cpu", "ort-cpu-single"), "ort-cpu", [("ort-cpu-single", 3), ("ort-cpu", 2), ("portable", 1)]),
        (("portable", "ort-cpu-single"), "ort-cpu", [("ort-cpu-single", 2), ("portable", 1)]),
        (("portable", "ort-cpu", "ort-cuda"), "ort-cuda", [("ort-cuda", 2), ("portable", 1)]),
        (("portable", "ort-cpu"), "ort-cuda", [("portable", 1)]),
    ],
)
def test_each_kind_of_graph_that_a_backend_runs_is_compared_the_one_it_uses_first(targets, backend, expected) -> None:
    manifest = fake_manifest().model_copy(update={"graphs": graphs(*targets)})
    found = sides.by_target(manifest, backend)
    assert [(target, len(variant.graphs)) for target, variant in found.items()] == expected


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


@pytest.mark.parametrize("is_large", [False, True])
def test_the_reference_computes_in_float32_and_a_large_one_keeps_its_layers_as_stored(is_large: bool, monkeypatch) -> None:
    model, cast = torch.nn.Linear(2, 2, dtype=torch.float16), []
    backbone = SimpleNamespace(model=model, dtype=torch.float16)
    monkeypatch.setattr(sides, "load_backbone", lambda *_, **options: cast.append(options) or backbone)
    monkeypatch.setattr(sides, "is_large", lambda _: is_large)
    monkeypatch.setattr(sides, "cast_all_but_layers", lambda *found: cast.append(found))
    monkeypatch.setattr(sides, "cast_layers_while_running", lambda *found: cast.append(found))
    monkeypatch.setattr(ReferenceSide, "settle", lambda _: cast.append("settled"))
    side = ReferenceSide.load("the model", fake_manifest())
    assert side.backbone.dtype == torch.float32
    assert model.weight.dtype == (torch.float16 if is_large else torch.float32)
    found = [{"trust_remote_code": False, "layers_as_stored": True}, *[(model, torch.float32)] * (2 * is_large), "settled"]
    assert cast == found


@pytest.mark.parametrize(("draft_vocab_size", "counts"), [(None, False), (27, True)])
def test_tokens_that_the_heads_do_not_know_have_no_probability(draft_vocab_size: int | None, counts: bool) -> None:
    """If the bundle leaves them out, what PyTorch gives them goes to the others."""
    backend = Unsure(manifest=fake_manifest(num_heads=1))
    backend.manifest.heads.draft_vocab_size = draft_vocab_size
    side, heads = Side(backend, "portable"), KnownHeads(backend)
    side.prompt_logits([3, 1, 4])
    candidates = set(side.proposed().token_ids[0, 0].tolist())
    heads.draft_ids = [*candidates, *sorted(set(range(50)) - candidates)[:23]]  # half of the tokens that are no candidates
    model = SimpleNamespace(get_output_embeddings=lambda: None, get_input_embeddings=lambda: None)
    torch_side = SimpleNamespace(backbone=SimpleNamespace(model=model), hidden=lambda prompt_ids: None)
    difference = validation._compare_heads([3, 1, 4], side, torch_side, heads)
    unknown = (1 - 0.6 * 1.875 / 2) / 2
    assert difference.max_abs == pytest.approx(-np.log(1 - unknown) if counts else 0, abs=1e-5)


class Sums:
    """A model whose state is the sum of the tokens so far, and whose logits are that sum and the last token."""

    def __init__(self) -> None:
        self.base_model = self.states
        self.cached: list[bool] = []

    def states(self, token_ids: torch.Tensor, use_cache: bool) -> tuple[torch.Tensor]:
        assert not use_cache
        return (token_ids.cumsum(-1)[..., None].float(),)

    def __call__(self, token_ids: torch.Tensor, *, use_cache: bool, past_key_values: Cached | None = None) -> SimpleNamespace:
        self.cached.append(use_cache)
        before = 0 if past_key_values is None else past_key_values.sums
        sums = before + token_ids.cumsum(-1)
        cache = Cached(sums[:, -1:]) if use_cache else None
        return SimpleNamespace(logits=torch.stack([sums, token_ids], -1).float(), past_key_values=cache)


class Cached:
    layers: ClassVar[list[object]] = []

    def __init__(self, sums: torch.Tensor) -> None:
        self.sums = sums

    def batch_repeat_interleave(self, count: int) -> None:
        self.sums = self.sums.repeat_interleave(count, 0)


@pytest.mark.parametrize("keeps_states", [False, True])
def test_the_reference_reads_texts_and_paths(keeps_states: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if keeps_states:
        monkeypatch.setattr(sides, "LinearAttentionCacheLayerMixin", SimpleNamespace)
        monkeypatch.setattr(Cached, "layers", [SimpleNamespace()])
        monkeypatch.setattr(Cached, "batch_repeat_interleave", None)
    model = Sums()
    side = ReferenceSide(SimpleNamespace(model=model))
    assert side.logits([3, 1, 4]).tolist() == [[3, 3], [4, 1], [8, 4]]
    assert model.cached == [False]
    assert side.hidden([3, 1, 4]).tolist() == [[8]]
    found = side.path_logits([3, 1], [[5], [2, 6, 7]])
    assert [rows.tolist() for rows in found] == [[[9, 5]], [[6, 2], [12, 6], [19, 7]]]


@pytest.mark.parametrize("num_processors", [0, 1])
def test_the_reference_changes_logits_as_transformers_generate_does(num_processors: int) -> None:
    """Each row after the tokens before it: here, the number of these is added."""
    asked = []

    class Processors(list):
        def __call__(self, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            asked.append(token_ids.tolist())
            return rows + token_ids.shape[1]

    def get_processors(config: object, **options: object) -> Processors:
        assert options["input_ids_seq_length"] == 2
        return Processors(range(num_processors))

    model = SimpleNamespace(
        generation_config=None, _prepare_special_tokens=lambda *_, **__: None, _get_logits_processor=get_processors
    )
    side = ReferenceSide(SimpleNamespace(model=model))
    side.generation = None
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = side.processed([7, 8], [9, 4, 6], rows)
    if num_processors:
        assert asked == [[[7, 8]], [[7, 8, 9]], [[7, 8, 9, 4]]]
        assert found.tolist() == [[3.0, 4.0], [6.0, 7.0], [9.0, 10.0]]
    else:
        assert found is rows


def test_only_a_bfloat16_bundle_on_a_cpu_is_copied(tmp_path: Path) -> None:
    manifest = fake_manifest()
    with sides.runnable_bundle(tmp_path, manifest) as found:
        assert found == (tmp_path, manifest, [])
    manifest.precision = "bf16"
    with sides.runnable_bundle(tmp_path, manifest, on_gpu=True) as found:
        assert found == (tmp_path, manifest, [])
    with pytest.raises(BundleError, match="cannot be read"), sides.runnable_bundle(tmp_path, manifest):
        pass


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
    assert report.verdicts()["head candidates"] == (True, "skipped: the heads are quantised as well")
    assert any("the heads are quantised as well" in note for note in report.notes)
    assert max(row.max_abs for row in [*report.prompt_logits, *report.tree_logits]) == 0
    assert not any("quantised" in note for note in validated(max_new_tokens=2).notes)
