"""Compares policies for growing the cache on the CPU: each decodes whole answers, in turn.

python bench/cache_growth.py BUNDLE [-o bench/results/cache_growth.json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_runtime import MedusaLM
from medusa_runtime.backends import ort_cpu
from medusa_runtime.backends.base import bucket

POLICIES: dict[str, Callable[[int], int]] = {
    "64 slots, or an eighth": bucket,
    "64 slots": lambda capacity: -(-capacity // 64) * 64,
    "256 slots": lambda capacity: -(-capacity // 256) * 256,
    "doubling from 256": lambda capacity: max(256, 1 << (capacity - 1).bit_length()),
}
PROMPTS = {"short": "Write a long story about a lighthouse.", "long": "The tide rises and the tide falls. " * 130}
NEW_TOKENS, ROUNDS = 200, 3


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, output: Path | None) -> None:
    """Measure BUNDLE."""
    lm = MedusaLM.from_bundle(bundle)
    result = environment() | {"unit": "ms a step with Medusa, growth included, median of generations", "policies": {}}
    for length, prompt in PROMPTS.items():
        times: dict[str, list[float]] = {name: [] for name in POLICIES}
        for _ in range(ROUNDS):
            for name, policy in POLICIES.items():
                with mock.patch.object(ort_cpu, "bucket", policy):
                    stats = lm.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True).stats
                times[name].append(1e3 * stats.decode_seconds / stats.num_steps)
        result["policies"][f"{length} prompt of {stats.num_prompt_tokens} tokens"] = {
            name: round(float(np.median(found)), 2) for name, found in times.items()
        }
    publish(result, output)


if __name__ == "__main__":
    main()
