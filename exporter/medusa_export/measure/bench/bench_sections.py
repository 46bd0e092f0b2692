"""Measurements in addition to the contest: times of steps, contexts and long prompts, each contestant in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medusa_export.measure.bench.bench_prompts import BenchPrompt, of_length
from medusa_export.measure.bench.contest import Contestant, rotated

STEP_CONTEXT = 256  # cached tokens when step times are measured, if a sequence may be twice as long
UNUSED_CONTEXT = 128  # cached tokens when the capacity of the cache is varied
STEP_REPEATS, LENGTH_REPEATS = 15, 3
CONTEXT_TOKENS = 17  # tokens decoded after a context; the first comes with its prefill


def step_costs(
    contestants: Sequence[Contestant],
    prompts: list[BenchPrompt],
    widths: Sequence[int],
    cached: int,
    tell: Callable[..., None],
) -> dict[str, Any]:
    """Milliseconds of a step by bundle and number of tokens, with a cached context, and milliseconds of the heads."""
    found = {}
    for bundle, contestant in _bundles(contestants).items():
        result = contestant.process.ask(
            "steps",
            widths=list(widths),
            token_ids=of_length(prompts, cached),
            capacity=cached + max(widths),
            repeats=STEP_REPEATS,
        )
        found[bundle] = {"step_ms": _ms(result["step_seconds"]), "heads_ms": _ms(result["head_seconds"])["1"]}
        tell()
    return {"cached_tokens": cached, "by_bundle": found}


def context_costs(
    contestants: Sequence[Contestant],
    prompts: list[BenchPrompt],
    lengths: Sequence[int],
    tree_nodes: int,
    tell: Callable[..., None],
) -> dict[str, Any]:
    """Milliseconds of steps of one token and of a whole tree, by bundle: after contexts, and with unused room in the cache."""
    used: dict[str, dict[str, Any]] = defaultdict(dict)
    unused: dict[str, dict[str, Any]] = defaultdict(dict)
    widths = sorted({1, tree_nodes})
    for bundle, contestant in _bundles(contestants).items():
        for length in lengths:
            for kept, context in ((used, length), (unused, min(UNUSED_CONTEXT, length))):
                result = contestant.process.ask(
                    "steps",
                    widths=widths,
                    token_ids=of_length(prompts, context),
                    capacity=length + tree_nodes,
                    repeats=STEP_REPEATS,
                )
                kept[bundle][str(length)] = _ms(result["step_seconds"])
            tell()
    return {"widths": widths, "unused_cached_tokens": UNUSED_CONTEXT, "used": dict(used), "unused": dict(unused)}


def lengths_costs(
    contestants: Sequence[Contestant],
    prompts: list[BenchPrompt],
    prefill: Sequence[int],
    context: Sequence[int],
    tell: Callable[..., None],
) -> dict[str, Any]:
    """Milliseconds to the first token of long prompts, and per token after them, by contestant without drafts."""
    firsts: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    nexts: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    plain = [one for one in contestants if not one.drafts]
    for length in sorted({*prefill, *context}):
        for repeat in range(LENGTH_REPEATS):
            token_ids = of_length(prompts, length, repeat)  # another start each time, so that no engine has it cached
            for contestant in rotated(plain, repeat):
                result = contestant.attempt(token_ids, CONTEXT_TOKENS if length in context else 1)
                if result is None:
                    continue
                first, *later = result["seconds"]
                firsts[contestant.name][length].append(first)
                if later:
                    nexts[contestant.name][length].append((later[-1] - first) / len(later))
        tell()
    return {
        "first_token_ms": {name: _medians(by_length) for name, by_length in firsts.items()},
        "ms_per_token": {name: _medians(by_length) for name, by_length in nexts.items()},
    }


def _bundles(contestants: Sequence[Contestant]) -> dict[str, Contestant]:
    """One contestant of each bundle. The contestants of a bundle share a process."""
    return {one.bundle: one for one in reversed(contestants) if one.bundle is not None}


def _ms(seconds: dict[str, float]) -> dict[str, float]:
    return {key: round(1e3 * value, 3) for key, value in seconds.items()}


def _medians(times: dict[int, list[float]]) -> dict[str, float]:
    return {str(length): round(1e3 * float(np.median(found)), 3) for length, found in sorted(times.items())}
