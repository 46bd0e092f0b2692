"""`medusa-export generate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

from medusa_export.cli.options import backend_option, threads_option


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="The prompt; - reads it from stdin.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="[default: 256, or what fits]")
@click.option("--tree", "tree_file", type=click.Path(path_type=Path), help="A candidate tree as JSON: choices, or parents.")
@click.option("--no-medusa", is_flag=True, help="Plain autoregressive decoding; the text is the same.")
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, token ids and statistics.")
@click.option("--ignore-eos", is_flag=True, help="Go on to --max-new-tokens.")
@click.option("--seed", type=int, help="Recorded in the JSON. Decoding is greedy, so it changes nothing.")
@click.option("--allow-failed", is_flag=True, help="Run a bundle even though its validation failed.")
@backend_option
@threads_option
def command(
    bundle: Path,
    prompt: str,
    max_new_tokens: int | None,
    tree_file: Path | None,
    *,
    no_medusa: bool,
    raw: bool,
    as_json: bool,
    ignore_eos: bool,
    seed: int | None,
    allow_failed: bool,
    backend: str,
    threads: int,
) -> None:
    """Answer a prompt with BUNDLE: text streams to stdout, statistics go to stderr."""
    from medusa_runtime import CandidateTree, DecodingStats, MedusaLM

    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode()
    tree = CandidateTree.from_file(tree_file) if tree_file else None
    lm = MedusaLM.from_bundle(bundle, backend, tree=tree, num_threads=threads, allow_failed=allow_failed)
    stats = DecodingStats()
    chunks = lm.stream(prompt, max_new_tokens=max_new_tokens, medusa=not no_medusa, raw=raw, ignore_eos=ignore_eos, stats=stats)
    text, finish_reason = "", None
    token_ids: list[int] = []
    for chunk in chunks:
        text += chunk.text
        token_ids += chunk.token_ids
        finish_reason = chunk.finish_reason
        if not as_json:
            click.echo(chunk.text, nl=False)
            sys.stdout.flush()
    if as_json:
        result = {"text": text, "token_ids": token_ids, "finish_reason": finish_reason, "seed": seed}
        facts = {"tokens_per_second": stats.tokens_per_second, "tokens_per_step": stats.tokens_per_step}
        click.echo(json.dumps(result | {"stats": dataclasses.asdict(stats) | facts}, ensure_ascii=False))
        return
    click.echo()
    click.echo(
        f"{'plain' if no_medusa else 'medusa'}: {stats.num_generated_tokens} tokens in {stats.num_steps} steps, "
        f"{stats.tokens_per_step:.2f} tokens/step, {stats.tokens_per_second:.1f} tokens/s, "
        f"first token after {1e3 * stats.prefill_seconds:.0f} ms, finished by {finish_reason}",
        err=True,
    )
