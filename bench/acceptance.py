"""Measures a bundle's tokens per step on prompts, in total and by category, for trees of several sizes.

    python bench/acceptance.py BUNDLE --prompts FILE.jsonl [--tree-nodes 16 --tree-nodes 64] [-o bench/results/acceptance.json]

Each row of FILE.jsonl has a `prompt`, or the `turns` of MT-bench (the first is used), and optionally a `category`. Trees come
from the `evaluation.json` of the heads (--heads) or from files (--tree). With exact acceptance every tree gives the same
tokens.
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

from medusa_runtime import CandidateTree, DecodingOptions, DynamicTree, MedusaLM
from medusa_runtime.bundle.manifest import Manifest


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Pairs of category and prompt."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    return [(row.get("category", "all"), row["prompt"] if "prompt" in row else row["turns"][0]) for row in rows]


def read_trees(heads: Path | None, nodes: tuple[int, ...], files: tuple[Path, ...]) -> list[CandidateTree]:
    trees = [CandidateTree.from_file(path) for path in files]
    if heads:
        evaluation = json.loads((heads / "evaluation.json").read_text(encoding="utf-8"))
        by_size = {tree["nodes"]: CandidateTree.from_json(tree["tree"]) for tree in evaluation["trees"]}
        trees += [by_size[count] for count in nodes]
    return trees


class Counts:
    """Numbers of verification steps and of the tokens from them."""

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
    lm: MedusaLM, prompts: list[tuple[str, str]], tree: CandidateTree | DynamicTree, options: DecodingOptions
) -> dict[str, Any]:
    """Decode all prompts with a tree, as many at the same time as the engine has slots."""
    counts: dict[str, Counts] = defaultdict(Counts)
    started, engine = time.perf_counter(), lm.engine
    options = DecodingOptions.of(options, tree=tree)
    sequences = {engine.add(lm.codec.encode(prompt), options): category for category, prompt in prompts}
    while not engine.is_idle:
        for sequence in engine.step():
            if sequence.is_finished:
                for name in (sequences[sequence], ""):
                    counts[name].answers += 1
                    counts[name].steps += sequence.stats.num_steps
                    counts[name].tokens += sequence.stats.num_decoded_tokens
        if (total := counts[""]).answers and total.answers % 8 == 0:
            click.echo(
                f"{tree.num_nodes} nodes: {total.answers} of {len(prompts)}, {total.entry()['tokens_per_step']}", err=True
            )
    total = counts.pop("")
    is_static = isinstance(tree, CandidateTree)
    return {
        "nodes": tree.num_nodes,
        "kind": "static" if is_static else "dynamic with prompt lookup" if options.prompt_lookup else "dynamic",
        **total.entry(),
        "seconds": round(time.perf_counter() - started, 1),
        "categories": {name: counts[name].entry() for name in sorted(counts)},
        **({"tree": tree.to_json()} if isinstance(tree, CandidateTree) else {}),
        "answers_token_ids": [sequence.token_ids for sequence in sequences],
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", required=True, type=click.Path(path_type=Path))
@click.option("--heads", type=click.Path(path_type=Path), help="Directory of heads with an evaluation.json that has trees.")
@click.option("--tree-nodes", multiple=True, type=int, default=(16, 64), show_default=True)
@click.option("--tree", "trees", multiple=True, type=click.Path(path_type=Path))
@click.option("--static/--no-static", default=True, help="Measure each size as a static tree.")
@click.option("--dynamic", is_flag=True, help="Measure each size also as a dynamic tree, rebuilt at each step.")
@click.option("--prompt-lookup", is_flag=True, help="Measure dynamic trees with prompt lookup.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--acceptance", type=click.Choice(["exact", "typical"]), default="exact", show_default=True)
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
    *,
    static: bool,
    dynamic: bool,
    prompt_lookup: bool,
    temperature: float,
    acceptance: str,
    max_new_tokens: int,
    batch_size: int,
    limit: int | None,
    output: Path | None,
) -> None:
    """Measure BUNDLE's tokens per step."""
    manifest = Manifest.load(bundle)
    lm = MedusaLM.from_bundle(bundle, max_batch_size=batch_size)
    asked = read_prompts(prompts)[:limit]
    fixed = read_trees(heads, tree_nodes, trees) or [CandidateTree.from_json(manifest.tree)]
    made = [DynamicTree(size) for size in sorted({tree.num_nodes for tree in fixed})]
    chosen = [*(fixed if static else ()), *(made if dynamic else ())]
    if not chosen and not prompt_lookup:
        raise click.UsageError("--no-static needs --dynamic or --prompt-lookup")
    options = DecodingOptions(max_new_tokens=max_new_tokens, temperature=temperature, acceptance=acceptance, seed=0)
    results = [measure(lm, asked, tree, options) for tree in chosen]
    if prompt_lookup:
        looking_up = DecodingOptions.of(options, prompt_lookup=True)
        results += [measure(lm, asked, tree, looking_up) for tree in made]
    answers = [result.pop("answers_token_ids") for result in results]
    result = environment() | {
        "prompts": prompts.name,
        "options": options.model_dump(exclude_defaults=True),
        "precision": manifest.precision,
        "heads": manifest.heads.model_dump(),
        # of one tree, nothing can be said
        "answers_equal_under_every_tree": sum(len({str(ids) for ids in same}) == 1 for same in zip(*answers, strict=True))
        if len(answers) > 1
        else None,
        "answers": len(asked),
        "trees": results,
    }
    publish(result, output)


if __name__ == "__main__":
    main()
