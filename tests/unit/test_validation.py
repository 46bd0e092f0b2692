"""Validation against a reference that is known exactly: what is wrong is found, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medusa_export.check import validation
from medusa_export.check.compare import divergences, first_divergence, logits_difference
from medusa_export.check.sides import BundleSide
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
from medusa_runtime.backends.base import StepOutput
from medusa_runtime.bundle.manifest import Manifest, file_facts
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

    def __init__(self, manifest: Manifest) -> None:
        self.backbone = SimpleNamespace(facts=manifest.model, model=torch.nn.Linear(1, 1))
        self.generation = None

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        return np.stack([logits_after(list(token_ids[:stop])) for stop in range(1, len(token_ids) + 1)])

    def path_logits(self, prompt_ids, paths):
        return [self.logits([*prompt_ids, *path])[len(prompt_ids) :] for path in paths]

    def processed(self, prompt_ids, answer_ids, rows):
        return rows


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ValidationReport]:
    """Validates a bundle whose backend goes wrong in one way."""

    def run(change: Change | None = None, **settings) -> ValidationReport:
        manifest = fake_manifest()
        for name in ("step.onnx", "heads.onnx", "weights.bin"):
            (tmp_path / name).write_bytes(b"")
            manifest.files[name] = file_facts(tmp_path / name)
        manifest.save(tmp_path)
        monkeypatch.setattr(validation.ReferenceSide, "load", lambda *_, **__: Reference(manifest))
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
