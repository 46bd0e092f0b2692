"""Compares int8 bundles of one model: the time of a step, and whether Medusa decoding gives what plain decoding gives.

    python bench/rotations.py BUNDLE... [--prompts FILE.jsonl] [--num-prompts 40] [-o bench/results/rotations.json]

Each row of FILE.jsonl has a `prompt`, or the `turns` of MT-bench. The bundles take turns in one process. Their quality is what
`medusa-export quantize` wrote to their manifests.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish
from parity import own_prompts, read_prompts
from step_cost import step

from medusa_runtime import Manifest, MedusaLM
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.choosing import open_backend

TOKENS = (1, 4, 8, 16, 64)
CAPACITY, CACHED = 256, 128
ROUNDS = 40
NEW_TOKENS = 128


def step_times(backends: dict[str, Backend]) -> dict[int, dict[str, dict[str, float]]]:
    """Milliseconds of a step by its tokens and by bundle: the median, and the least of all rounds."""
    found = {}
    for tokens in TOKENS:
        times: dict[str, list[float]] = {name: [] for name in backends}
        for _ in range(ROUNDS + 2):
            for name, backend in backends.items():
                run = step(backend, tokens, CACHED)
                started = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - started))
        found[tokens] = {
            name: {"median": round(float(np.median(all_times[2:])), 2), "least": round(min(all_times[2:]), 2)}
            for name, all_times in times.items()
        }
    return found


def answers(bundle: Path, prompts: list[str]) -> dict[str, Any]:
    """How many answers are the same with and without Medusa, and how many tokens are before the first that differs."""
    lm = MedusaLM.from_bundle(bundle)
    equal, first, per_step = 0, [], []
    for prompt in prompts:
        medusa, plain = (
            lm.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, medusa=medusa) for medusa in (True, False)
        )
        places = [place for place in range(NEW_TOKENS) if medusa.token_ids[place] != plain.token_ids[place]]
        equal += not places
        first.append(min(places, default=NEW_TOKENS))
        per_step.append(medusa.stats.tokens_per_step)
    return {
        "num_prompts": len(prompts),
        "num_equal": equal,
        "equal_tokens_median": float(np.median(first)),
        "tokens_per_step": round(float(np.mean(per_step)), 3),
    }


@click.command()
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--prompts", type=click.Path(path_type=Path))
@click.option("--num-prompts", default=40, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundles: tuple[Path, ...], prompts: Path | None, num_prompts: int, output: Path | None) -> None:
    """Compare BUNDLES on the CPU."""
    manifests = {bundle.name: Manifest.load(bundle) for bundle in bundles}
    backends: dict[str, Backend] = {}
    for bundle in bundles:
        backends[bundle.name] = open_backend(bundle, manifests[bundle.name])
        backends[bundle.name].resize(1, CAPACITY)
    times = step_times(backends)
    backends.clear()
    texts = (read_prompts(prompts) if prompts else own_prompts())[:num_prompts]
    facts = {name: manifest.quantization for name, manifest in manifests.items()}
    result = environment() | {
        "unit": "ms",
        "step_by_tokens": times,
        "bundles": {
            bundle.name: {
                "megabytes": round(sum(file.size for file in manifests[bundle.name].files.values()) / 1e6, 1),
                "quantization": None if (found := facts[bundle.name]) is None else found.model_dump(exclude_none=True),
                "medusa_against_plain": answers(bundle, texts) if texts else None,
            }
            for bundle in bundles
        },
    }
    publish(result, output)


if __name__ == "__main__":
    main()
