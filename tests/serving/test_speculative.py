"""`metrics.speculative_decoding`: counts that AIPerf takes.

The checks are those of AIPerf 0.13's `SpecDecodeAcceptanceRecord` and `VLLMSpecDecodeAdapter`.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from medusa_runtime import DecodingStats
from medusa_runtime.decoding.stats import StepCounts
from medusa_serve.telemetry import speculative_metrics
from tests.support.fake_backend import FakeBackend, fake_manifest
from tests.support.steps import steps_and_cuts
from tests.unit.test_service import service


def check_as_aiperf(told: dict[str, Any]) -> None:
    """What AIPerf refuses, and what the fields mean."""
    told = json.loads(json.dumps(told, allow_nan=False))
    histogram = told["acceptance_histogram"]
    assert all(type(count) is int and count >= 0 for count in histogram)
    assert len(histogram) == told["num_spec_tokens"] + 1
    assert sum(histogram) == told["num_spec_steps"]
    assert sum(count * steps for count, steps in enumerate(histogram)) == told["num_accepted_draft_tokens"]
    assert 0 <= told["num_accepted_draft_tokens"] <= told["num_draft_tokens"]
    assert 0 <= told["draft_acceptance_rate"] <= 1
    if told["num_spec_steps"]:
        assert told["mean_acceptance_length"] == 1 + told["num_accepted_draft_tokens"] / told["num_spec_steps"]


@given(st.lists(steps_and_cuts(), max_size=3), st.integers(0, 5))
def test_aiperf_takes_the_counts_of_any_answers(answers, num_heads) -> None:
    stats = []
    for run in answers:
        stats.append(DecodingStats())
        for step, num_unused in run:
            stats[-1].count_step(step)
            if num_unused:
                stats[-1].take_back(step, num_unused)
    told = speculative_metrics(stats, num_heads)
    check_as_aiperf(told)
    assert told["num_spec_steps"] == sum(bool(step.drafted) for run in answers for step, _ in run)
    assert told["num_spec_tokens"] >= num_heads


def test_an_answer_without_steps_has_a_record_of_zeros() -> None:
    told = speculative_metrics([DecodingStats()], 4)
    check_as_aiperf(told)
    assert told["acceptance_histogram"] == [0, 0, 0, 0, 0]
    assert speculative_metrics([], 4) == told


def test_the_histogram_says_how_many_steps_accepted_so_many_drafts() -> None:
    stats = DecodingStats()
    for num_accepted in (0, 2, 2, 1):
        stats.count_step(StepCounts([3, 2], [], [False] * num_accepted, num_accepted + 1))
    stats.count_step(StepCounts([], [], [], 1))  # without a draft
    assert speculative_metrics([stats], 3) == {
        "mean_acceptance_length": 2.25,
        "draft_acceptance_rate": 0.25,
        "acceptance_histogram": [1, 1, 2, 0],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 5,
        "num_draft_tokens": 20,
        "num_spec_tokens": 3,
    }


def test_real_answers_with_stop_texts_and_lookups_pass() -> None:
    with service(backend=FakeBackend("always", fake_manifest(max_seq_len=300)), prompt_lookup=True) as lm:
        whole = lm.generate("abcabcabc", max_new_tokens=60)
        cuts = [lm.generate("abcabcabc", max_new_tokens=60, stop=whole.text[place]) for place in range(3, 30, 4)]
        plain = lm.generate("abcabcabc", max_new_tokens=20, medusa=False)
    for result in (whole, *cuts, plain):
        check_as_aiperf(speculative_metrics([result.stats], 3))
    assert speculative_metrics([plain.stats], 3)["num_spec_steps"] == 0
