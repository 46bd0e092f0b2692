"""A batch job: reads a file of prompts and writes a file of answers, decoded with continuous batching.

    python examples/batch_job.py build/smollm2-135m-instruct-fp32 prompts.jsonl -o answers.jsonl --max-new-tokens 128

The prompts are a text file with one per line, or JSON lines with "prompt" or "messages" (other fields are kept).
The answers are JSON lines in the same order. A prompt that cannot be answered gets an "error" instead, and the job continues.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import click

from medusa_runtime import GenerationOptions, GenerationResult, Handle, MedusaError, MedusaLM

Row = dict[str, Any]


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False))
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.File("w", encoding="utf-8"),
    default="-",
    help="file for the answers, in JSON lines  [default: stdout]",
)
@click.option("--max-new-tokens", type=int, help=GenerationOptions.model_fields["max_new_tokens"].description)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy")
@click.option("--seed", type=int, help="random seed, used for each prompt; gives the same answers again")
@click.option("--max-batch-size", type=int, default=8, show_default=True, help="answers decoded at the same time")
@click.option("--max-queue", type=int, default=32, show_default=True, help="answers that can wait for a place")
def main(bundle: str, prompts: Path, output: TextIO, max_batch_size: int, max_queue: int, **fields: Any) -> None:
    """Answer all PROMPTS with the model in BUNDLE."""
    try:
        options = GenerationOptions.of(**fields)
        rows = read(prompts)
        with MedusaLM.from_bundle(bundle, max_batch_size=max_batch_size, max_queue=max_queue) as lm:
            started = time.perf_counter()
            for row, answer in zip(rows, answers(lm, rows, options, max_batch_size + max_queue), strict=True):
                click.echo(json.dumps(row | told(answer), ensure_ascii=False), file=output)
            report(lm, len(rows), time.perf_counter() - started)
    except MedusaError as error:
        raise click.ClickException(str(error)) from error


def read(path: Path) -> list[Row]:
    """Read the prompts as rows of JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{path} is not UTF-8 text") from error
    texts = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in texts]
    rows = []
    for number, line in texts:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise click.UsageError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("messages", row.get("prompt")), str | list):
            raise click.UsageError(f"{path}:{number} has neither a prompt nor messages; give one of them")
        rows.append(row)
    return rows


def answers(
    lm: MedusaLM, rows: Iterable[Row], options: GenerationOptions, most: int
) -> Iterator[GenerationResult | MedusaError]:
    """The answer to each row, in order. At most `most` requests are unfinished at a time, so that none is refused."""
    under_way: deque[Handle | MedusaError] = deque()
    for row in rows:
        if len(under_way) == most:
            yield finish(under_way.popleft())
        under_way.append(submit(lm, row, options))
    while under_way:
        yield finish(under_way.popleft())


def submit(lm: MedusaLM, row: Row, options: GenerationOptions) -> Handle | MedusaError:
    try:
        return lm.submit(row["messages"] if "messages" in row else row["prompt"], options)
    except MedusaError as error:  # for example, the prompt is too long
        return error


def finish(asked: Handle | MedusaError) -> GenerationResult | MedusaError:
    try:
        return asked if isinstance(asked, MedusaError) else asked.result()
    except MedusaError as error:  # it failed during decoding
        return error


def told(answer: GenerationResult | MedusaError) -> Row:
    if isinstance(answer, MedusaError):
        return {"error": str(answer)}
    return {
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "num_tokens": len(answer.token_ids),
        "tokens_per_step": round(answer.stats.tokens_per_step, 2),
    }


def report(lm: MedusaLM, num_rows: int, seconds: float) -> None:
    stats = lm.stats()
    tokens = stats.decoding.num_generated_tokens
    click.echo(
        f"{stats.num_completed} of {num_rows} prompts answered: {tokens} tokens in {seconds:.1f} s, "
        f"{tokens / seconds:.1f} tokens/s, {stats.decoding.tokens_per_step:.2f} tokens/step",
        err=True,
    )


if __name__ == "__main__":
    main()
