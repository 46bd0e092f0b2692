"""The decoding loop without text: it takes and prints token ids, and decodes several prompts in one batch.

    python examples/token_loop.py build/smollm2-135m-instruct-fp32 504,3575,282 1,2,3 --max-new-tokens 16

A step of the engine is one round of Medusa decoding for every sequence in a slot:

    propose   the heads' guesses for the next tokens form a tree of drafts below the last decided token
    verify    one forward pass over the whole tree gives the model's own next token after each draft
    accept    the longest path that the model agrees with, plus one more token from the model itself
    commit    the entries of that path stay in the KV cache; the next step overwrites the others

Sequences join and leave between steps. When a sequence joins, its prompt is read first, which gives one token.
"""

from __future__ import annotations

import click

from medusa_runtime import DecodingEngine, DecodingOptions, Manifest, MedusaError
from medusa_runtime.backends.choosing import open_backend


def token_ids(text: str) -> list[int]:
    return [int(token_id) for token_id in text.split(",")]


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False))
@click.argument("prompts", type=token_ids, nargs=-1, required=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--max-batch-size", type=click.IntRange(1), default=4, show_default=True)
def main(bundle: str, prompts: list[list[int]], max_new_tokens: int, max_batch_size: int) -> None:
    """Continue PROMPTS, each a list of token ids, with the model in BUNDLE."""
    try:
        decode(bundle, prompts, max_new_tokens, max_batch_size)
    except MedusaError as error:
        raise click.ClickException(str(error)) from error


def decode(bundle: str, prompts: list[list[int]], max_new_tokens: int, max_batch_size: int) -> None:
    manifest = Manifest.load(bundle)
    manifest.require_intact(bundle)
    engine = DecodingEngine(open_backend(bundle, manifest), max_batch_size=max_batch_size)
    options = DecodingOptions.of(max_new_tokens=max_new_tokens)
    # the prompts are checked here and decoded by the steps
    sequences = [engine.add(prompt_ids, options) for prompt_ids in prompts]

    while not engine.is_idle:
        for sequence in engine.step():  # the sequences with new tokens
            for step in sequence.take_steps():
                accepted, bonus = step.token_ids[: step.num_accepted], step.token_ids[step.num_accepted :]
                click.echo(f"{sequence.id}: {accepted} + {bonus} {step.finish_reason or ''}".rstrip())

    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
        click.echo(f"{sequence.id}= {sequence.token_ids}")
    click.echo(f"{engine.stats.tokens_per_step:.2f} tokens/step", err=True)


if __name__ == "__main__":
    main()
