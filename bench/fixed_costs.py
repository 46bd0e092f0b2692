"""Decodes with costs of steps that do not change, and counts the time by them: what the choice of drafts alone is worth.

    python bench/fixed_costs.py BUNDLE --prompts mt_bench.jsonl [-o bench/results/fixed_costs.json]

Real steps take longer or shorter from minute to minute, and the choice follows. Here all that is random is left out, but for
the time that lookups take. So two versions of the choice can be compared closely: run it with either checkout on PYTHONPATH.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_export.measure.prompt_files import read_prompts
from medusa_runtime import DynamicTree, MedusaLM, StepCosts
from medusa_runtime.backends.base import Backend
from medusa_runtime.decoding.engine import DecodingEngine, DecodingOptions

WIDTHS = [1, 2, 4, 8, 16, 32, 64]
TABLES = {  # milliseconds of a step by its tokens: measured and rounded (decisions 43, 45); the last is dearer than any of them
    "int8, AMX": [10.5, 11.7, 12.7, 15.3, 21.1, 36.4, 61.0],
    "fp32": [26.0, 28.0, 30.5, 37.0, 44.0, 66.0, 105.0],
    "int8-blocks": [10.4, 12.2, 14.8, 20.0, 30.1, 51.6, 94.4],
    "int4": [10.0, 12.3, 17.0, 27.0, 46.0, 83.0, 155.0],
    "dear drafts": [10.0, 14.0, 20.5, 34.0, 60.0, 110.0, 210.0],
}
HEADS, HOST, DRAFTS = 1.2, 0.35, 0.6  # milliseconds of the heads, of the host without drafts, and of what drafts add to it
NODES = 16


class FixedCosts:
    """A table that learns nothing."""

    def __init__(self, table: StepCosts) -> None:
        self._table = table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def observe(self, *_: object, **__: object) -> None:
        """Leave the costs as they are."""

    observe_heads = observe_host = observe


class Counted:
    """Counts the passes of a backend and adds up their milliseconds by a table, from when it is told to.

    It replaces methods of the backend itself.
    """

    def __init__(self, backend: Backend, steps: Sequence[float]) -> None:
        self._steps, self.counts = steps, False
        self.milliseconds, self.num_steps, self.num_asked = 0.0, 0, 0
        self._step, self._propose = type(backend).step.__get__(backend), type(backend).propose.__get__(backend)
        backend.step, backend.propose = self.step, self.propose  # type: ignore[method-assign]

    def step(self, token_ids: Any, *words: Any, **named: Any) -> Any:
        """A step, counted."""
        if self.counts:
            self.milliseconds += float(np.interp(token_ids.shape[1], WIDTHS, self._steps)) + HOST
            self.num_steps += 1
        return self._step(token_ids, *words, **named)

    def propose(self, *words: Any, **named: Any) -> Any:
        """A call of the heads, counted."""
        if self.counts:
            self.milliseconds += HEADS + DRAFTS
            self.num_asked += 1
        return self._propose(*words, **named)


def decoded(
    lm: MedusaLM, prompts: Sequence[Any], steps: Sequence[float], max_new_tokens: int, *, lookup: bool
) -> dict[str, float]:
    """Decode all prompts with one engine, one after the other. The prompts' own passes do not count."""
    table = StepCosts([1], WIDTHS, [192], [[[ms / 1e3 for ms in steps]]], [HEADS / 1e3], [HOST / 1e3], [DRAFTS / 1e3])
    backend = lm.engine.backend
    counted = Counted(backend, steps)
    engine = DecodingEngine(
        backend, DynamicTree(NODES), max_batch_size=1, costs=FixedCosts(table),  # type: ignore[arg-type]
        ngrams=lm.engine.ngrams, prompt_lookup=lookup, reuse_prefixes=False,
    )  # fmt: skip
    count = sum(len(tokens) for prompt in prompts for tokens in _decoded(engine, counted, prompt, max_new_tokens))
    return {
        "tokens_per_second": round(1e3 * count / counted.milliseconds, 1),
        "over_plain": round(1e3 * count / counted.milliseconds / (1e3 / (steps[0] + HOST)), 3),
        "tokens_per_step": round(count / counted.num_steps, 3),
        "heads_asked": round(counted.num_asked / counted.num_steps, 2),
    }


def _decoded(engine: DecodingEngine, counted: Counted, prompt: list[int], max_new_tokens: int) -> Iterator[Sequence[int]]:
    """The tokens of each step after the prompt."""
    counted.counts = False
    for steps in engine.generate([prompt], options=DecodingOptions(max_new_tokens=max_new_tokens, ignore_eos=True)):
        if counted.counts:
            yield [token for step in steps for token in step.token_ids]
        counted.counts = True


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), required=True)
@click.option("--limit", default=16, show_default=True, help="Take this many prompts, evenly over the file.")
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, prompts: Path, limit: int, max_new_tokens: int, output: Path | None) -> None:
    """Decode with BUNDLE on the CPU."""
    found = read_prompts(prompts)
    chosen = [found[place] for place in np.linspace(0, len(found) - 1, min(limit, len(found))).astype(int)]
    with MedusaLM.from_bundle(bundle, "ort-cpu") as lm:
        assert lm.codec is not None
        token_ids = [list(lm.codec.encode(prompt)) for prompt in chosen]
        tables: dict[str, Any] = {}
        for name, steps in TABLES.items():
            tables[name] = {"step_ms": dict(zip(map(str, WIDTHS), steps, strict=True))}
            for mode in ("heads", "lookup"):
                tables[name][mode] = decoded(lm, token_ids, steps, max_new_tokens, lookup=mode == "lookup")
                click.echo(f"{name}, {mode}: {tables[name][mode]}", err=True)
    publish(environment() | {"prompts": len(chosen), "max_new_tokens": max_new_tokens, "tables": tables}, output)


if __name__ == "__main__":
    main()
