"""What a service gets: throughput and latency against concurrent callers, and the part of the time that is not the engine's.

    python bench/serving.py BUNDLE [--prompts FILE] [-o bench/results/serving.json]

Callers send their next prompt as soon as they have an answer. All ways to decode take turns in one process, so that drift of
the machine hits all alike. `plain` is batched decoding without Medusa; `learned` and `measured` are Medusa with a tree made at
each step, no larger than pays: by what steps were seen to cost, or by a table measured before. `full` verifies all of it.
"""

from __future__ import annotations

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
REQUESTS_PER_CALLER, LEAST_REQUESTS, ROUNDS = 2, 4, 3


class Clock:
    """A backend that notes the time spent in its forward passes."""

    def __init__(self, backend: Any) -> None:
        self._backend, self.seconds = backend, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in {"step", "propose"}:
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return found(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def load(lm: MedusaLM, prompts: Sequence[str], callers: int, max_new_tokens: int, **fields: Any) -> dict[str, float]:
    """Answer prompts with so many callers at once."""
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
    """The part of the time that is spent outside forward passes, from the request to the last answer."""
    before, started = clock.seconds, time.perf_counter()
    lm.generate_batch((list(prompts) * batch)[:batch], max_new_tokens=64, ignore_eos=True, **fields)
    return 1 - (clock.seconds - before) / (time.perf_counter() - started)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="JSON lines with a prompt each; our own without it.")
@click.option("--max-new-tokens", default=96, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, prompts: Path | None, max_new_tokens: int, output: Path | None) -> None:
    """Measure BUNDLE on the CPU."""
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()] if prompts else list(PROMPTS)
    largest = max(CONCURRENCY)
    costs = StepCosts.measure(open_backend(bundle, Manifest.load(bundle)), max_batch_size=largest)

    def open_with(costs: Any) -> MedusaLM:
        return MedusaLM.from_bundle(
            bundle, max_batch_size=largest, costs=costs, tree=DynamicTree(16), reuse_prefixes=False, verify_files=False
        )

    learned, measured, fixed = open_with("learn"), open_with(costs), open_with(None)
    clock = Clock(learned.engine.backend)
    learned.engine.backend = clock
    modes: dict[str, tuple[MedusaLM, dict[str, Any]]] = {
        "plain": (learned, {"medusa": False}),
        "learned": (learned, {}),
        "measured": (measured, {}),
        "full": (fixed, {}),
    }
    for model, fields in modes.values():
        load(model, texts, 2, 16, **fields)
    found: dict[int, dict[str, list[dict[str, float]]]] = {}
    for callers in CONCURRENCY:
        found[callers] = defaultdict(list)
        for _ in range(ROUNDS):
            for name, (model, fields) in modes.items():
                if name != "full" or callers == 1:
                    found[callers][name].append(load(model, texts, callers, max_new_tokens, **fields))
        click.echo(
            f"{callers}: { {name: [round(r['tokens_per_second']) for r in runs] for name, runs in found[callers].items()} }",
            err=True,
        )
    by_callers = {
        callers: {
            name: {key: round(float(np.median([run[key] for run in runs])), 3) for key in runs[0]}
            for name, runs in by_mode.items()
        }
        for callers, by_mode in found.items()
    }
    overheads = {
        f"{name}, batch {batch}": round(
            float(np.median([overhead(learned, clock, texts, batch, **fields) for _ in range(ROUNDS)])), 4
        )
        for batch in (1, 8)
        for name, fields in (
            ("plain", {"medusa": False}),
            ("medusa", {}),
            ("sampled", {"temperature": 0.8, "top_p": 0.95, "seed": 1}),
        )
    }
    plain_alone = by_callers[1]["plain"]["tokens_per_second"]
    publish(
        environment()
        | {
            "unit": "medians of rounds",
            "max_new_tokens": max_new_tokens,
            "by_callers": by_callers,
            "over_plain": {
                callers: {
                    name: round(entry["tokens_per_second"] / by_mode["plain"]["tokens_per_second"], 3)
                    for name, entry in by_mode.items()
                }
                for callers, by_mode in by_callers.items()
            },
            "eight_callers_over_one_at_a_time_without_medusa": round(
                by_callers[8]["learned"]["tokens_per_second"] / plain_alone, 2
            ),
            "share_outside_forward_passes": overheads,
            "step_costs": {"batch_sizes": costs.batch_sizes, "widths": costs.widths, "capacities": costs.capacities}
            | {
                "step_seconds": np.round(costs.step_seconds, 4).tolist(),
                "head_seconds": np.round(costs.head_seconds, 4).tolist(),
            },
        },
        output,
    )


if __name__ == "__main__":
    main()
