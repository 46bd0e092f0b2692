"""Tokens per step of a bundle on a set of prompts, over all and by category, for trees of some sizes.

    python bench/acceptance.py BUNDLE --prompts FILE.jsonl [--tree-nodes 16 --tree-nodes 64] [-o bench/results/acceptance.json]

FILE.jsonl has a `prompt`, or the `turns` of MT-bench (the first is asked), and maybe a `category`, in each row. Trees come from
`evaluation.json` beside the heads (--heads) or from files (--tree). Decoding is greedy: every tree gives the same tokens.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_runtime import CandidateTree, DecodingStats, MedusaLM
from medusa_runtime.manifest import Manifest


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Pairs of category and prompt."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [(row.get("category", "all"), row["prompt"] if "prompt" in row else row["turns"][0]) for row in rows]


def read_trees(heads: Path | None, nodes: tuple[int, ...], files: tuple[Path, ...]) -> list[CandidateTree]:
    trees = [CandidateTree.from_file(path) for path in files]
    if heads:
        evaluation = json.loads((heads / "evaluation.json").read_text())
        by_size = {tree["nodes"]: CandidateTree.from_json(tree["tree"]) for tree in evaluation["trees"]}
        trees += [by_size[count] for count in nodes]
    return trees


class Counts:
    """Verification steps and the tokens they gave."""

    def __init__(self) -> None:
        self.steps = self.tokens = self.answers = 0

    def entry(self) -> dict[str, Any]:
        return {
            "answers": self.answers,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_step": round(self.tokens / max(1, self.steps), 4),
        }


def measure(
    lm: MedusaLM, prompts: list[tuple[str, str]], tree: CandidateTree, batch: int, max_new_tokens: int
) -> dict[str, Any]:
    counts: dict[str, Counts] = defaultdict(Counts)
    answers: list[list[int]] = []
    started = time.perf_counter()
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        encoded = [lm.codec.encode(prompt) for _, prompt in part]
        token_ids: list[list[int]] = [[] for _ in part]
        for place, decided in enumerate(lm.engine.generate(encoded, max_new_tokens, tree=tree, stats=DecodingStats())):
            for step in decided:
                token_ids[step.sequence] += step.token_ids
                if place:  # the first comes from the prefill
                    for name in (part[step.sequence][0], ""):
                        counts[name].steps += 1
                        counts[name].tokens += len(step.token_ids)
        for name, _ in part:
            counts[name].answers += 1
            counts[""].answers += 1
        answers += token_ids
        click.echo(
            f"{tree.num_nodes} nodes: {len(answers)} of {len(prompts)}, {counts[''].entry()['tokens_per_step']}", err=True
        )
    total = counts.pop("")
    return {
        "nodes": tree.num_nodes,
        **total.entry(),
        "seconds": round(time.perf_counter() - started, 1),
        "categories": {name: counts[name].entry() for name in sorted(counts)},
        "tree": tree.to_json(),
        "answers_token_ids": answers,
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", required=True, type=click.Path(path_type=Path))
@click.option("--heads", type=click.Path(path_type=Path), help="Heads with an evaluation.json, to take trees from.")
@click.option("--tree-nodes", multiple=True, type=int, default=(16, 64), show_default=True)
@click.option("--tree", "trees", multiple=True, type=click.Path(path_type=Path))
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--limit", type=int)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    bundle: Path,
    prompts: Path,
    heads: Path | None,
    tree_nodes: tuple[int, ...],
    trees: tuple[Path, ...],
    max_new_tokens: int,
    batch_size: int,
    limit: int | None,
    output: Path | None,
) -> None:
    """Measure BUNDLE's tokens per step."""
    manifest = Manifest.load(bundle)
    lm = MedusaLM.from_bundle(bundle)
    asked = read_prompts(prompts)[:limit]
    chosen = read_trees(heads, tree_nodes, trees) or [CandidateTree.from_json(manifest.tree)]
    results = [measure(lm, asked, tree, batch_size, max_new_tokens) for tree in chosen]
    answers = [result.pop("answers_token_ids") for result in results]
    result = environment() | {
        "prompts": prompts.name,
        "max_new_tokens": max_new_tokens,
        "precision": manifest.precision,
        "heads": manifest.heads.model_dump(),
        "answers_equal_under_every_tree": all(other == answers[0] for other in answers),
        "trees": results,
    }
    publish(result, output)


if __name__ == "__main__":
    main()
