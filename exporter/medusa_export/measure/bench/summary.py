"""Statistics of answers: rates, times, parts, speed-ups and agreement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.measure.bench.contest import Answer

RESAMPLES, CONFIDENCE = 2000, 0.95
Floats = npt.NDArray[np.float64]


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """Statistics of one contestant's answers. Rates are medians over prompts of the medians over rounds."""
    rates = np.array(list(rate_by_prompt(answers).values()))
    whole = np.array(list(_by_prompt((one.prompt, one.whole_tokens_per_second) for one in answers).values()))
    decoding = [one for one in answers if one.num_decoded]
    per_token = [1e3 * one.decode_seconds / one.num_decoded for one in decoding]
    steps = sum(one.num_steps for one in decoding)
    low, high = _percentiles(rates, 10, 90)
    return {
        "num_answers": len(answers),
        "tokens_per_second": _median(rates),
        "tokens_per_second_p10": low,
        "tokens_per_second_p90": high,
        "tokens_per_second_with_prompt": _median(whole),
        "first_token_ms": _median([1e3 * one.seconds[0] for one in answers]),
        "ms_per_token_p50": _median(per_token),
        "ms_per_token_p95": _percentiles(per_token, 95)[0],
        "tokens_per_step": _rounded(sum(one.num_decoded for one in decoding) / steps) if steps else None,
        "ms_per_step": _rounded(1e3 * sum(one.decode_seconds for one in decoding) / steps) if steps else None,
        "ms_per_step_parts": _parts(decoding, steps),
    }


def rate_by_prompt(answers: Iterable[Answer]) -> dict[int, float]:
    """Tokens per second of each prompt, as the median over its rounds."""
    return _by_prompt((one.prompt, one.tokens_per_second) for one in answers if one.num_decoded)


def by_category(answers: Sequence[Answer], categories: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Tokens per second and tokens per step by category of prompts."""
    found: dict[str, list[Answer]] = defaultdict(list)
    for one in answers:
        if one.num_decoded:
            found[categories[one.prompt]].append(one)
    return {
        name: {
            "tokens_per_second": _median(list(rate_by_prompt(found[name]).values())),
            "tokens_per_step": _rounded(
                sum(one.num_decoded for one in found[name]) / sum(one.num_steps for one in found[name])
            ),
        }
        for name in sorted(found)
    }


def ratio(above: Sequence[Answer], below: Sequence[Answer]) -> dict[str, Any] | None:
    """The speed-up of one contestant over another, on the prompts that both answered.

    It is the median over prompts, with a confidence interval from a bootstrap over prompts.
    """
    rates, others = rate_by_prompt(above), rate_by_prompt(below)
    ratios = np.array([rates[prompt] / others[prompt] for prompt in rates if prompt in others])
    if not len(ratios):
        return None
    low, high = bootstrap(ratios)
    return {"ratio": _median(ratios), "low": low, "high": high, "num_prompts": len(ratios)}


def bootstrap(values: Floats, seed: int = 0) -> tuple[float, float]:
    """The confidence interval (`CONFIDENCE`) of the median of `values`, by bootstrap: resampling with replacement."""
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    medians = np.median(values[picks], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = _percentiles(medians, tail, 100 - tail)
    return low, high


def agreement(answers: Sequence[Answer], reference: Sequence[Answer]) -> dict[str, Any]:
    """How much of the token ids equals the reference's answers to the same prompts."""
    expected = {one.prompt: one.token_ids for one in reference}
    compared = {one.prompt: one.token_ids for one in answers if one.prompt in expected}
    places = [first_divergence(token_ids, expected[prompt]) for prompt, token_ids in compared.items()]
    parted = [place for place in places if place is not None]
    return {
        "num_answers": len(places),
        "num_equal": len(places) - len(parted),
        "first_divergence_min": min(parted, default=None),
        "first_divergence_median": _median(parted) if parted else None,
    }


def first_divergence(token_ids: Sequence[int], others: Sequence[int]) -> int | None:
    """The index of the first difference, or the shorter length if one is a prefix of the other. None if they are equal."""
    for place, (token, other) in enumerate(zip(token_ids, others, strict=False)):
        if token != other:
            return place
    return None if len(token_ids) == len(others) else min(len(token_ids), len(others))


def _parts(answers: Sequence[Answer], steps: int) -> dict[str, float] | None:
    """Milliseconds per step by part. "other" is the rest of decoding; "text" is measured apart and not part of it."""
    if not steps or not all(one.parts for one in answers):
        return None
    totals: dict[str, float] = defaultdict(float)
    for one in answers:
        for name, seconds in one.parts.items():
            totals[name] += seconds
    text = totals.pop("text", 0.0)
    totals["other"] = sum(one.decode_seconds for one in answers) - sum(totals.values())
    return {name: _rounded(1e3 * seconds / steps) for name, seconds in (totals | {"text": text}).items()}


def _by_prompt(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    found: dict[int, list[float]] = defaultdict(list)
    for prompt, value in pairs:
        found[prompt].append(value)
    return {prompt: float(np.median(values)) for prompt, values in found.items()}


def _median(values: Sequence[float] | Floats) -> float | None:
    return _rounded(float(np.median(values))) if len(values) else None


def _percentiles(values: Sequence[float] | Floats, *ranks: float) -> list[Any]:
    return [_rounded(float(value)) for value in np.percentile(values, ranks)] if len(values) else [None for _ in ranks]


def _rounded(value: float) -> float:
    return round(value, 4)
