"""A benchmark's result as one dictionary. It is written as JSON, and tables and plots are made from it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from typing import Any

from medusa_export.measure.bench.contest import Answer, Contestant
from medusa_export.measure.bench.contest_state import Bench
from medusa_export.measure.bench.machine import machine
from medusa_export.measure.bench.summary import agreement, by_category, first_divergence, ratio, summarize
from medusa_export.provenance import provenance
from medusa_runtime.bundle.manifest import Manifest

Answers = dict[str, list[Answer]]
PLAIN = "plain"


def result_of(bench: Bench, *, complete: bool) -> dict[str, Any]:
    """The result so far."""
    made = provenance()
    answers: Answers = defaultdict(list)
    for one in bench.answers:
        answers[one.contestant].append(one)
    measured = [one for one in bench.contestants if answers[one.name]]
    return {
        "complete": complete,
        "command": made.command,
        "created": made.created,
        "versions": made.versions,
        "peer_versions": bench.chosen.versions,
        "machine": machine(),
        "settings": _settings(bench),
        "prompts": _prompts(bench),
        "contestants": [_contestant(bench, one, answers) for one in measured],
        "ratios": _ratios(measured, answers),
        "floors": bench.floors,
        "absent": bench.chosen.absent,
        "failed": bench.failed | {one.name: one.failure for one in bench.contestants if one.failure},
        **bench.sections,
    }


def slower_than_plain(result: dict[str, Any]) -> str | None:
    """A warning that names the contestants with which Medusa is slower than plain decoding; None if there are none."""
    by_name = {one["name"]: one for one in result["contestants"]}
    slow = [
        f"{pair['above']} ({pair['ratio']:.2f} times as fast, {pair['low']:.2f} to {pair['high']:.2f})"
        for pair in result["ratios"]
        if pair["ratio"] < 1 and pair["above"] in by_name and by_name[pair["below"]].get("mode") == PLAIN
        and by_name[pair["above"]]["bundle"] == by_name[pair["below"]]["bundle"]
    ]  # fmt: skip
    return f"Medusa is slower than plain decoding on the same bundle: {'; '.join(slow)}" if slow else None


def _settings(bench: Bench) -> dict[str, Any]:
    return {
        "threads": bench.threads,
        "spin": bench.options.spin,
        "placements": {name: str(placement) for name, placement in bench.placements.items()},
        "cuda_graphs": bench.options.cuda_graphs,
        "rounds": bench.options.rounds,
        "max_new_tokens": bench.options.max_new_tokens,
        "decoding": "greedy, end-of-sequence tokens ignored, token ids in and token ids out, one request at a time",
    }


def _prompts(bench: Bench) -> dict[str, Any]:
    token_ids = [one.token_ids for one in bench.prompts]
    return {
        "file": bench.options.prompts.name if bench.options.prompts else None,
        "count": len(token_ids),
        "categories": dict(Counter(one.category for one in bench.prompts)),
        "tokens": sum(map(len, token_ids)),
        "sha256": hashlib.sha256(json.dumps(token_ids).encode()).hexdigest(),
    }


def _contestant(bench: Bench, one: Contestant, answers: Answers) -> dict[str, Any]:
    reference = _reference(bench, one)
    own, plain = answers[one.name], answers[reference]
    expected = {answer.prompt: answer.token_ids for answer in plain}
    manifest = bench.bundles[one.bundle][1] if one.bundle else None
    return {
        "name": one.name,
        "kind": one.kind,
        "bundle": one.bundle,
        "mode": one.mode,
        "precision": _precision(manifest) if manifest else None,
        **summarize(own),
        "memory_mb": bench.memory.get(one.bundle or one.name),
        "compared_with": reference if plain else None,
        "agreement": agreement(own, plain) if plain else None,
        "categories": by_category(own, [prompt.category for prompt in bench.prompts]),
        "answers": [
            {
                "prompt": bench.prompts[answer.prompt].key,
                "round": answer.round,
                "tokens_per_second": round(answer.tokens_per_second, 3) if answer.num_decoded else None,
                "first_token_ms": round(1e3 * answer.seconds[0], 3),
                "num_steps": answer.num_steps,
                "first_divergence": first_divergence(answer.token_ids, expected[answer.prompt])
                if answer.prompt in expected
                else None,
            }
            for answer in own
        ],
    }


def _precision(manifest: Manifest) -> str:
    return manifest.quantization.scheme if manifest.quantization else manifest.precision


def _reference(bench: Bench, one: Contestant) -> str:
    """The contestant to compare tokens with: plain decoding of the same bundle; of the first bundle for other engines."""
    is_drafting = one.bundle is not None and one.mode != PLAIN
    return f"{one.bundle if is_drafting else next(iter(bench.bundles))} {PLAIN}"


def _ratios(measured: list[Contestant], answers: Answers) -> list[dict[str, Any]]:
    """Speed-ups of every mode over plain decoding of the same bundle, and of our fastest contestant over every other engine."""
    own = [one for one in measured if one.bundle]
    plain = {one.bundle: one for one in own if one.mode == PLAIN}
    pairs = [(one, plain[one.bundle]) for one in own if one.mode != PLAIN and one.bundle in plain]
    if own:
        best = max(own, key=lambda one: summarize(answers[one.name])["tokens_per_second"] or 0.0)
        pairs += [(best, one) for one in measured if not one.bundle]
    found = [
        {"above": above.name, "below": below.name, "found": ratio(answers[above.name], answers[below.name])}
        for above, below in pairs
    ]
    return [{"above": one["above"], "below": one["below"], **one["found"]} for one in found if isinstance(one["found"], dict)]
