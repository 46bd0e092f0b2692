"""Measures a service: throughput and latency by number of concurrent callers, and the time spent outside forward passes.

    python bench/serving.py BUNDLE [--prompts FILE] [-o bench/results/serving.json]

Callers send their next prompt as soon as they have an answer. All ways to decode take turns in one process, so that changes of
the machine's speed affect all alike. `plain` is batched decoding without Medusa. `learned` and `measured` are Medusa with a
dynamic tree as large as pays, by costs learned while decoding, or measured before and corrected while decoding. `lookup` is
`measured` with prompt lookup. `full` always verifies the whole tree. All but `measured` and `full` are also sampled at
temperature 0.8. What a way gains over plain decoding is told by rounds: the median, and the least and the most.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_export.measure.bench.own import Clock
from medusa_runtime import DynamicTree, Manifest, MedusaLM, StepCosts, open_backend

PROMPTS = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that reverses a string.",
    "Give me five tips for a healthy breakfast.",
    "What is the capital of France, and what is it known for?",
    "Write a short letter to a friend about a week at the sea.",
    "How do plants make sugar from light?",
    "List three uses of a hammer.",
    "Tell me a short story about a lighthouse.",
    "Translate into plain English: the party of the first part shall indemnify the party of the second part.",
    "A train travels 60 km in 45 minutes. What is its speed in km/h?",
    "Suggest a name for a bakery and say why it fits.",
    "What is the difference between weather and climate?",
)
CONCURRENCY = (1, 2, 4, 8, 16)
REQUESTS_PER_CALLER, LEAST_REQUESTS, ROUNDS = 2, 4, 4


def load(lm: MedusaLM, prompts: Sequence[str], callers: int, max_new_tokens: int, **fields: Any) -> dict[str, float]:
    """Answer prompts with `callers` concurrent callers."""
    wanted = [prompts[number % len(prompts)] for number in range(max(LEAST_REQUESTS, REQUESTS_PER_CALLER * callers))]
    started = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        results = list(pool.map(lambda prompt: lm.generate(prompt, max_new_tokens=max_new_tokens, **fields), wanted))
    seconds = time.perf_counter() - started
    stats = [result.stats for result in results]
    decoded, steps = sum(one.num_decoded_tokens for one in stats), sum(one.num_steps for one in stats)
    return {
        "tokens_per_second": sum(one.num_generated_tokens for one in stats) / seconds,
        "tokens_per_step": decoded / steps,
        "nodes_per_step": 1 + sum(one.num_draft_tokens for one in stats) / steps,
        "first_token_ms": 1e3 * float(np.median([one.first_token_seconds for one in stats])),
        "ms_per_token": 1e3 * float(np.median([one.seconds_per_token for one in stats])),
    }


def overhead(lm: MedusaLM, clock: Clock, prompts: Sequence[str], batch: int, **fields: Any) -> float:
    """The part of the time spent outside forward passes, from the request to the last answer."""
    before, started = passes(clock), time.perf_counter()
    lm.generate_batch((list(prompts) * batch)[:batch], max_new_tokens=64, ignore_eos=True, **fields)
    return 1 - (passes(clock) - before) / (time.perf_counter() - started)


def passes(clock: Clock) -> float:
    """Seconds of all forward passes so far."""
    return clock.seconds["step"] + clock.seconds["propose"]


Modes = dict[str, tuple[MedusaLM, dict[str, Any]]]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 1}


def throughput(modes: Modes, texts: Sequence[str], max_new_tokens: int, callers: int) -> dict[str, list[dict[str, float]]]:
    """What `load` found in each round, by mode. The modes take turns, in every second round from the last to the first."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(ROUNDS):
        for name, (model, fields) in list(modes.items())[:: -1 if number % 2 else 1]:
            if name != "full" or callers == 1:
                found[name].append(load(model, texts, callers, max_new_tokens, **fields))
    seen = {name: [round(run["tokens_per_second"]) for run in runs] for name, runs in found.items()}
    click.echo(f"{callers}: {seen}", err=True)
    return found


def over_plain(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """By mode, how many times as many tokens a second as plain decoding in the same round: the median, the least, the most."""
    gains = {}
    for name, runs in found.items():
        plain = found["plain, sampled" if name.endswith("sampled") else "plain"]
        ratios = [run["tokens_per_second"] / other["tokens_per_second"] for run, other in zip(runs, plain, strict=True)]
        gains[name] = {
            key: round(float(of(ratios)), 3) for key, of in (("median", np.median), ("least", np.min), ("most", np.max))
        }
    return gains


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each number over the rounds."""
    return {key: round(float(np.median([run[key] for run in runs])), 3) for key in runs[0]}


def overheads(lm: MedusaLM, texts: Sequence[str]) -> dict[str, float]:
    """Medians of `overhead` by mode and batch size."""
    clock = Clock(lm.engine.backend)
    kinds: dict[str, dict[str, Any]] = {"plain": {"medusa": False}, "medusa": {}, "sampled": SAMPLED}
    return {
        f"{name}, batch {batch}": round(
            float(np.median([overhead(lm, clock, texts, batch, **fields) for _ in range(ROUNDS)])), 4
        )
        for batch in (1, 8)
        for name, fields in kinds.items()
    }


def rounded(costs: StepCosts) -> dict[str, Any]:
    """A cost table with rounded numbers."""
    return {name: np.round(table, 4).tolist() for name, table in dataclasses.asdict(costs).items()}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="JSON lines with a prompt each. [default: built-in prompts]")
@click.option("--max-new-tokens", default=96, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, prompts: Path | None, max_new_tokens: int, output: Path | None) -> None:
    """Measure BUNDLE on the CPU."""
    texts = (
        [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8-sig").split("\n") if line]
        if prompts
        else list(PROMPTS)
    )
    settings: dict[str, Any] = {"max_batch_size": max(CONCURRENCY), "reuse_prefixes": False, "tree": DynamicTree(16)}
    costs = StepCosts.measure(open_backend(bundle, Manifest.load(bundle)), max_batch_size=max(CONCURRENCY))

    def opened(costs: Any, *, prompt_lookup: bool = False) -> MedusaLM:
        return MedusaLM.from_bundle(bundle, costs=costs, prompt_lookup=prompt_lookup, **settings)

    learned, lookup = opened("learn"), opened(costs, prompt_lookup=True)
    modes: Modes = {
        "plain": (learned, {"medusa": False}),
        "learned": (learned, {}),
        "measured": (opened(costs), {}),
        "lookup": (lookup, {}),
        "full": (opened(None), {}),
        "plain, sampled": (learned, {"medusa": False, **SAMPLED}),
        "learned, sampled": (opened("learn"), SAMPLED),
        "lookup, sampled": (opened(costs, prompt_lookup=True), SAMPLED),
    }
    for model, fields in modes.values():
        load(model, texts, 2, 16, **fields)
    found = {callers: throughput(modes, texts, max_new_tokens, callers) for callers in CONCURRENCY}
    by_callers = {callers: {name: medians(runs) for name, runs in by_mode.items()} for callers, by_mode in found.items()}
    eight, one = by_callers[8]["learned"]["tokens_per_second"], by_callers[1]["plain"]["tokens_per_second"]
    result = environment() | {
        "unit": "medians of rounds",
        "max_new_tokens": max_new_tokens,
        "by_callers": by_callers,
        "over_plain": {callers: over_plain(by_mode) for callers, by_mode in found.items()},
        "eight_callers_over_one_at_a_time_without_medusa": round(eight / one, 2),
        "share_outside_forward_passes": overheads(learned, texts),
        "step_costs": rounded(costs),
    }
    publish(result, output)


if __name__ == "__main__":
    main()
