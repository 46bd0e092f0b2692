"""Decodes with costs of steps that do not change, and counts the time by them: what the choice of drafts alone is worth.

    python bench/fixed_costs.py BUNDLE --prompts mt_bench.jsonl [-o bench/results/fixed_costs.json]

The model decodes each prompt once, without drafts, and the heads' guesses after each token are kept. Then the runtime decodes
the same answers again from what was kept, once for each table of costs. Nothing there is random or timed by a clock, so two
versions of the choice can be compared closely: run it with either checkout on PYTHONPATH.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_export.measure.prompt_files import read_prompts
from medusa_runtime import DynamicTree, MedusaLM, StepCosts
from medusa_runtime.backends.base import Backend, HeadOutput, StepOutput
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
LOOKUP = 0.1  # milliseconds of one lookup
NODES = 16


@dataclass
class Answer:
    """A prompt, the greedy answer to it, and what the heads guessed after each of its tokens."""

    prompt: list[int]
    token_ids: list[int]  # the prompt's, then the answer's
    guesses: dict[int, HeadOutput]  # by the position that the heads read


@dataclass
class Replayed:
    """A backend that decodes one answer again, and counts its steps after the prompt and their milliseconds by a table."""

    answer: Answer
    real: Backend
    steps: Sequence[float]
    milliseconds: float = 0.0
    num_steps: int = 0
    num_asked: int = 0
    num_slots: int = 1
    capacity: int = 0
    _positions: Any = field(default=None, repr=False)  # of the last step's rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def resize(self, num_slots: int, capacity: int, lengths: Sequence[int] = ()) -> None:  # noqa: ARG002
        """Note the size of a cache that there is not."""
        self.num_slots, self.capacity = num_slots, capacity

    def step(self, input_ids: Any, position_ids: Any, _mask: Any, lengths: Any, rows: Any, **_: object) -> StepOutput:
        """What the answer goes on with after each row. Rows of other tokens are not reached, so their results do not matter."""
        if lengths[0] >= len(self.answer.prompt):
            self.milliseconds += float(np.interp(input_ids.shape[1], WIDTHS, self.steps)) + HOST
            self.num_steps += 1
        self._positions = np.take_along_axis(position_ids, rows, 1)
        after = np.minimum(self._positions + 1, len(self.answer.token_ids) - 1)
        return StepOutput(np.array(self.answer.token_ids)[after])

    def propose(self, rows: Any, _root_ids: Any) -> HeadOutput:
        """What the heads guessed there."""
        position = int(self._positions[0, rows[0]])
        if position >= len(self.answer.prompt):
            self.milliseconds += HEADS + DRAFTS
            self.num_asked += 1
        return self.answer.guesses[min(position, max(self.answer.guesses))]

    def commit(self, slot: int, start: int, nodes: Any) -> None:
        """There are no entries."""

    def clear(self, slot: int, start: int, stop: int) -> None:
        """There are no entries."""


class FixedCosts:
    """A table that learns nothing."""

    def __init__(self, table: StepCosts) -> None:
        self._table = table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def observe(self, *_: object, **__: object) -> None:
        """Leave the costs as they are."""

    observe_heads = observe_host = observe


def recorded(lm: MedusaLM, prompt: list[int], max_new_tokens: int) -> Answer:
    """Decode a prompt with the real model, and keep the heads' guesses after each token."""
    backend, guesses = lm.engine.backend, {}
    step = type(backend).step.__get__(backend)

    def recording(input_ids: Any, position_ids: Any, mask: Any, lengths: Any, rows: Any, **words: Any) -> StepOutput:
        output: StepOutput = step(input_ids, position_ids, mask, lengths, rows, **words)
        last = rows.shape[1] - 1
        heads = backend.propose(np.array([last]), output.greedy_ids[:, last])
        guesses[int(position_ids[0, rows[0, last]])] = HeadOutput(heads.token_ids.copy(), heads.log_probs.copy())
        return output

    backend.step = recording  # type: ignore[method-assign]
    try:
        engine = DecodingEngine(backend, DynamicTree(1), max_batch_size=1, reuse_prefixes=False)
        options = DecodingOptions(max_new_tokens=max_new_tokens, ignore_eos=True)
        token_ids = [token for steps in engine.generate([prompt], options=options) for one in steps for token in one.token_ids]
    finally:
        del backend.step
    return Answer(prompt, [*prompt, *token_ids], guesses)


def decoded(lm: MedusaLM, answers: Sequence[Answer], steps: Sequence[float], *, lookup: bool) -> dict[str, float]:
    """Decode all answers again with one engine, one after the other. The prompts' own passes do not count."""
    table = StepCosts([1], WIDTHS, [192], [[[ms / 1e3 for ms in steps]]], [HEADS / 1e3], [HOST / 1e3], [DRAFTS / 1e3])
    backend = Replayed(answers[0], lm.engine.backend, steps)
    engine = DecodingEngine(
        backend, DynamicTree(NODES), max_batch_size=1, costs=FixedCosts(table),  # type: ignore[arg-type]
        ngrams=lm.engine.ngrams, prompt_lookup=lookup, reuse_prefixes=False,
    )  # fmt: skip
    budget = engine._proposer._budget
    assert budget is not None
    note = budget.note_lookup
    budget.note_lookup = lambda seconds: note(seconds and LOOKUP / 1e3)  # type: ignore[method-assign]
    count = 0
    for answer in answers:
        backend.answer, again = answer, []
        options = DecodingOptions(max_new_tokens=len(answer.token_ids) - len(answer.prompt), ignore_eos=True)
        for number, found in enumerate(engine.generate([answer.prompt], options=options)):
            tokens = [token for one in found for token in one.token_ids]
            again += tokens
            count += len(tokens) if number else 0
        assert [*answer.prompt, *again] == answer.token_ids, "another answer"
    milliseconds = backend.milliseconds + (LOOKUP * backend.num_steps if lookup else 0.0)
    return {
        "tokens_per_second": round(1e3 * count / milliseconds, 1),
        "over_plain": round(count / milliseconds * (steps[0] + HOST), 3),
        "tokens_per_step": round(count / backend.num_steps, 3),
        "heads_asked": round(backend.num_asked / backend.num_steps, 2),
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), required=True)
@click.option("--limit", default=40, show_default=True, help="Take this many prompts, evenly over the file.")
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, prompts: Path, limit: int, max_new_tokens: int, output: Path | None) -> None:
    """Decode with BUNDLE on the CPU, and again from what was kept."""
    found = read_prompts(prompts)
    chosen = [found[place] for place in np.linspace(0, len(found) - 1, min(limit, len(found))).astype(int)]
    with MedusaLM.from_bundle(bundle, "ort-cpu") as lm:
        assert lm.codec is not None
        answers = [recorded(lm, list(lm.codec.encode(prompt)), max_new_tokens) for prompt in chosen]
        tables: dict[str, Any] = {}
        for name, steps in TABLES.items():
            tables[name] = {"step_ms": dict(zip(map(str, WIDTHS), steps, strict=True))}
            for mode in ("heads", "lookup"):
                tables[name][mode] = decoded(lm, answers, steps, lookup=mode == "lookup")
                click.echo(f"{name}, {mode}: {tables[name][mode]}", err=True)
    publish(environment() | {"prompts": len(chosen), "max_new_tokens": max_new_tokens, "tables": tables}, output)


if __name__ == "__main__":
    main()
