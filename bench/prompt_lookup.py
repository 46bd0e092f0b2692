"""Measures prompt lookup: tokens per step and per second, with and without heads, by how much answers copy.

    python bench/prompt_lookup.py BUNDLE [--prompts FILE.jsonl] [-o bench/results/prompt_lookup.json]

`edit` prompts ask for a changed text or program, `ask` prompts for a summary or an answer from a text
(bench/copying_prompts.py). `ordinary` prompts contain no text: they are those of bench/serving.py, or FILE.jsonl with rows as
for bench/acceptance.py. Tokens per step are counted with full trees, so they do not depend on time. Tokens per second are
measured for one answer at a time, with trees as large as pays. Each way to decode has its own engine, and they take turns.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from acceptance import read_prompts
from copying_prompts import ASK, EDIT
from environment import environment, publish

from medusa_runtime import DynamicTree, Manifest, MedusaLM
from serving import PROMPTS

MODES: dict[str, dict[str, Any]] = {
    "plain": {"medusa": False},
    "heads": {"prompt_lookup": False},
    "lookup": {"medusa": False, "prompt_lookup": True},
    "heads and lookup": {"prompt_lookup": True},
}
Prompts = Mapping[str, Sequence[str]]


def count_steps(lm: MedusaLM, prompts: Prompts, **options: Any) -> tuple[dict[str, Any], list[list[int]]]:
    """Numbers of steps and tokens by kind of prompt, and the tokens of all answers."""
    entries: dict[str, Any] = {}
    answers: list[list[int]] = []
    for kind, texts in prompts.items():
        results = lm.generate_batch(texts, **options)
        stats = [result.stats for result in results]
        steps, tokens = sum(one.num_steps for one in stats), sum(one.num_decoded_tokens for one in stats)
        entries[kind] = {
            "answers": len(results),
            "tokens": tokens,
            "steps": steps,
            "tokens_per_step": round(tokens / steps, 3),
            "looked_up": sum(one.num_looked_up_tokens for one in stats),
            "nodes_per_step": round(1 + sum(one.num_draft_tokens for one in stats) / steps, 2),
        }
        answers += [result.token_ids for result in results]
    return entries, answers


def measure_speed(lm: MedusaLM, prompts: Prompts, **options: Any) -> dict[str, float]:
    """Decoded tokens per second by kind of prompt, one answer at a time."""
    lm.generate(prompts["edit"][0], **options)  # warm up: costs are learned while decoding
    found = {}
    for kind, texts in prompts.items():
        stats = [lm.generate(text, **options).stats for text in texts]
        found[kind] = sum(one.num_decoded_tokens for one in stats) / sum(one.decode_seconds for one in stats)
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="JSON lines with ordinary prompts.")
@click.option("--nodes", default=16, show_default=True, help="Nodes of the largest tree.")
@click.option("--max-new-tokens", default=224, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Rounds of the speed measurement; 0 for none.")
@click.option("--threads", default=0, show_default=True, help="CPU threads; 0 for one per core.")
@click.option("--limit", type=int, help="Number of prompts of each kind.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    bundle: Path,
    prompts: Path | None,
    nodes: int,
    max_new_tokens: int,
    rounds: int,
    threads: int,
    limit: int | None,
    output: Path | None,
) -> None:
    """Measure BUNDLE."""
    ordinary = [text for _, text in read_prompts(prompts)] if prompts else PROMPTS
    by_kind = {kind: tuple(texts)[:limit] for kind, texts in (("edit", EDIT), ("ask", ASK), ("ordinary", ordinary))}
    settings: dict[str, Any] = {"tree": DynamicTree(nodes), "num_threads": threads}

    steps, answers = {}, []
    with MedusaLM.from_bundle(bundle, costs=None, **settings) as lm:
        for mode, fields in MODES.items():
            steps[mode], given = count_steps(lm, by_kind, max_new_tokens=max_new_tokens, **fields)
            answers.append(given)
            click.echo(f"{mode}: { {kind: entry['tokens_per_step'] for kind, entry in steps[mode].items()} }", err=True)
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for mode, fields in MODES.items():
            with MedusaLM.from_bundle(bundle, costs="learn", max_batch_size=1, reuse_prefixes=False, **settings) as lm:
                found = measure_speed(lm, by_kind, max_new_tokens=max_new_tokens, **fields)
            for kind, rate in found.items():
                speeds[mode][kind].append(rate)
            click.echo(f"{mode}: { {kind: round(rate, 1) for kind, rate in found.items()} } tokens/s", err=True)
    manifest = Manifest.load(bundle)
    result = environment() | {
        "ordinary_prompts": prompts.name if prompts else "bench/serving.py",
        "precision": manifest.precision,
        "heads": manifest.heads.model_dump(),
        "tree_nodes": nodes,
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "answers": len(answers[0]),
        "answers_equal_in_every_mode": sum(len({str(ids) for ids in same}) == 1 for same in zip(*answers, strict=True)),
        "steps": steps,
        "tokens_per_second": {
            mode: {kind: round(float(np.median(rates)), 2) for kind, rates in by.items()} for mode, by in speeds.items()
        },
    }
    publish(result, output)


if __name__ == "__main__":
    main()
