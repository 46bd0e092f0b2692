"""Differences of logits, answers and distributions, and what a report makes of them, with numbers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from medusa_export.check import quality
from medusa_export.check.compare import divergences, first_divergence, log_softmax, logits_difference
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
from tests.support.fake_backend import FakeBackend, fake_manifest, logits_after
from tests.support.known_model import GREEDY, PROMPTS_READ


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


def test_a_verdict_tells_the_worst_of_all_rows() -> None:
    rows = [
        LogitsDifference(what="", num_rows=2, max_abs=1e-3, min_cosine=0.5, max_kl=1e-8),
        LogitsDifference(what="", num_rows=3, max_abs=4e-3, min_cosine=1.0, max_kl=1e-9),
    ]
    report = ValidationReport(
        reference="", backend="", precision="fp32", tolerance=TOLERANCES["fp32"], prompt_logits=rows, tree_logits=rows[:1],
        provenance=fake_manifest().provenance,
    )  # fmt: skip
    assert report.verdicts()[PROMPTS_READ] == (True, "5 rows: max |Δ| 4.0e-03, cosine ≥ 0.5000000, KL ≤ 1.0e-08")
    assert report.facts().summary["max_abs"] == 4e-3
    assert report.verdicts()[GREEDY] == (False, "not compared")


def test_rows_of_zeros_are_alike() -> None:
    difference = logits_difference("rows", np.zeros((2, 3)), np.zeros((2, 3)))
    assert (difference.max_abs, difference.max_kl, difference.min_cosine) == (0.0, 0.0, 0.0)
    assert difference.within(TOLERANCES["fp32"])


def test_a_loss_of_quality_is_told_in_one_line() -> None:
    found = quality.Quality(
        num_tokens=200,
        perplexity=10.5,
        perplexity_before=10.0,
        mean_kl=0.0123,
        max_kl=0.5,
        same_greedy=0.975,
        tokens_per_step=2.0,
    )
    assert found.line() == (
        "KL 0.0123 nats on average and 0.5000 at the worst position, perplexity 10.000 → 10.500 (+5.00%), the same greedy "
        "token at 97.5% of 200 positions, 2.000 tokens per step"
    )
    assert found.model_copy(update={"tokens_per_step_before": 2.25}).line().endswith(", 2.250 → 2.000 tokens per step")


@pytest.mark.parametrize(("margin", "passes"), [(1e-3, True), (2e-3, False)])
def test_one_prompt_whose_tokens_differ_fails_all(margin: float, passes: bool) -> None:
    found = Divergence(position=0, token_id=1, reference_token_id=2, logit=0, reference_logit=margin, margin=margin)
    rows = [
        GreedyComparison(prompt=name, num_tokens=3, plain_vs_reference=other, medusa_vs_plain=None, tokens_per_step=1.0)
        for name, other in (("a", []), ("b", [found]))
    ]
    report = ValidationReport(
        reference="", backend="", precision="fp32", tolerance=TOLERANCES["fp32"], greedy=rows,
        provenance=fake_manifest().provenance,
    )  # fmt: skip
    assert report.verdicts()[GREEDY] == (passes, "6 tokens of 2 prompts; 1 prompts differ, see below")
