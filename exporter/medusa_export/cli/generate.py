"""`medusa-export generate`."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medusa_export.cli import streams
from medusa_export.cli.commands import Command
from medusa_export.cli.fields import options_from, parse
from medusa_export.cli.shared_options import decodes_a_bundle
from medusa_runtime.bundle.cpu import Spin
from medusa_runtime.bundle.files import json_text, read_json
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.errors import OptionError
from medusa_runtime.options import GenerationOptions

if TYPE_CHECKING:
    from medusa_runtime import Choice, GenerationResult, MedusaLM

log = logging.getLogger(__name__)

BY_HAND = ("logit_bias", "medusa", "tree", "json_schema", "grammar")  # fields whose flags need parsing of their own
LEFT_OUT = ("tools", "documents", "template_options", "drafts")  # fields that no flag can hold, or that come with chunks


@click.command("generate", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="The prompt; - reads it from stdin. Token ids if BUNDLE has no tokenizer.")
@options_from(GenerationOptions, leave_out=(*BY_HAND, *LEFT_OUT))
@click.option("--logit-bias", multiple=True, metavar="ID=BIAS", help="Add BIAS to the logit of token ID. May be repeated.")
@click.option(
    "--json-schema",
    type=click.Path(path_type=Path),
    help="File with a JSON schema that the answer must match (extra structured).",
)
@click.option(
    "--grammar",
    type=click.Path(path_type=Path),
    help="File with a grammar, in llguidance's Lark form or llama.cpp's GBNF, that the answer must match.",
)
@click.option(
    "--tree", "tree_file", type=click.Path(path_type=Path), help="File with a candidate tree as JSON: choices or parents."
)
@click.option(
    "--tree-nodes", type=int, help="Use a dynamic tree of this many nodes, rebuilt at each step from the heads' probabilities."
)
@click.option("--no-medusa", is_flag=True, help="Plain autoregressive decoding.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object with text, token ids and statistics; NaN and infinity become null.",
)
@click.option("--allow-failed", is_flag=True, help="Run a bundle even though its validation failed.")
@decodes_a_bundle
def command(
    bundle: Path,
    prompt: str,
    *,
    logit_bias: tuple[str, ...],
    json_schema: Path | None,
    grammar: Path | None,
    tree_file: Path | None,
    tree_nodes: int | None,
    no_medusa: bool,
    as_json: bool,
    allow_failed: bool,
    allow_engine_code: bool,
    backend: str,
    device: str,
    cuda_graphs: bool | None,
    threads: int,
    spin: Spin,
    **fields: Any,
) -> None:
    """Answer a prompt with BUNDLE. The text streams to stdout, statistics go to stderr.

    Decoding is greedy unless a temperature is given. With a temperature, answers are samples of exactly the model's
    distribution, and the same seed gives the same text with and without Medusa. The exception is --acceptance typical, which
    accepts more drafts than that.
    """
    from medusa_export.placement import place
    from medusa_export.progress import say, waiting
    from medusa_runtime import Manifest, MedusaLM

    if prompt == "-":
        prompt = _read_stdin()
    if tree_file is not None and tree_nodes is not None:
        raise OptionError("--tree and --tree-nodes exclude each other")
    given = {
        "logit_bias": dict(_bias(text) for text in logit_bias) or None,
        "json_schema": _read_schema(json_schema) if json_schema is not None else None,
        "grammar": _read(grammar, "grammar") if grammar is not None else None,
        "medusa": False if no_medusa else None,
        "tree": CandidateTree.from_file(tree_file)
        if tree_file
        else DynamicTree(tree_nodes)
        if tree_nodes is not None
        else None,
    }
    options = parse(GenerationOptions, fields | given)
    placement = place(Manifest.load(bundle), backend, device, threads=threads, spin=spin, cuda_graphs=cuda_graphs, tell=False)
    with waiting(f"check and open {bundle}"):
        opened = MedusaLM.from_bundle(
            bundle,
            placement.backend,
            max_batch_size=None if options.n > 1 else 1,
            prompt_lookup=options.prompt_lookup,
            device=placement.device,
            num_threads=threads,
            spin=spin,
            cuda_graphs=cuda_graphs,
            allow_failed=allow_failed,
            allow_engine_code=allow_engine_code,
        )
    with opened as lm:
        ids = None if lm.manifest.has_text else _token_ids(prompt)
        result = _answer(lm, prompt if ids is None else ids, options, streamed=not as_json)
    if as_json:
        click.echo(json_text(_facts_of_all(result), ensure_ascii=not streams.holds_unicode()))
    for choice in () if as_json else result.choices:
        say(_statistics(choice, options))
    log.debug("chosen because: %s", placement.why)
    say(f"ran with {placement if placement.is_fallback else f'{placement.backend} on {placement.device}'}")


def _facts_of_all(result: GenerationResult) -> dict[str, Any]:
    """A result as JSON: the first answer's facts, and those of all if there are several."""
    first, *others = [_facts(choice) for choice in result.choices]
    scores = {} if result.prompt_logprobs is None else {"prompt_logprobs": [asdict(one) for one in result.prompt_logprobs]}
    return first | scores | {"prompt_ids": result.prompt_ids} | ({"choices": [first, *others]} if others else {})


def _statistics(choice: Choice, options: GenerationOptions) -> str:
    """An answer's counts and speed, in one line."""
    stats = choice.stats
    line = (
        f"{'medusa' if options.medusa else 'plain'}: {stats.num_generated_tokens} tokens, of which the prompt gave the "
        f"first and {stats.num_steps} steps gave {stats.num_decoded_tokens} ({stats.tokens_per_step:.2f} tokens/step), "
        f"{stats.tokens_per_second:.1f} tokens/s, "
        f"first token after {1e3 * stats.first_token_seconds:.0f} ms, finished by {choice.finish_reason}"
    )
    return line + (f", seed {choice.seed}" if options.is_sampled else "")


def _answer(lm: MedusaLM, prompt: str | list[int], options: GenerationOptions, *, streamed: bool) -> GenerationResult:
    """The answers. If `streamed`, the first is printed while it is decoded, the others after it."""
    handle = lm.stream(prompt, options)
    for chunk in handle:
        if streamed and chunk.index == 0:
            click.echo(chunk.text if isinstance(prompt, str) else "".join(f"{token} " for token in chunk.token_ids), nl=False)
            sys.stdout.flush()
    result = handle.result()
    if streamed:
        click.echo()
        for number, choice in enumerate(result.choices[1:], start=2):
            click.echo(f"\n[answer {number}]\n{choice.text}")
    return result


def _token_ids(prompt: str) -> list[int]:
    """The prompt of a bundle without a tokenizer."""
    words = prompt.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise OptionError(
            f"this bundle has no tokenizer; give the prompt as token ids, such as -p '1 42 7', not {prompt[:40]!r}"
        )
    return [int(word) for word in words]


def _facts(choice: Choice) -> dict[str, Any]:
    stats = choice.stats
    rates = {"tokens_per_second": stats.tokens_per_second, "tokens_per_step": stats.tokens_per_step}
    facts = asdict(choice)
    facts["stats"] |= rates
    return {name: value for name, value in facts.items() if value is not None}


def _read_stdin() -> str:
    if sys.stdin is None:
        raise OptionError("-p - reads the prompt from stdin, and stdin is closed; give the prompt with -p")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except OSError as error:
        raise OptionError(f"-p - reads the prompt from stdin, which cannot be read: {error.strerror or error}") from error


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise OptionError(f"--logit-bias is {text!r}; it must be a token id, = and a number, such as 42=-5") from error


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the {what} {path}: {error}") from error


def _read_schema(path: Path) -> dict[str, Any]:
    try:
        schema = read_json(path, "utf-8-sig")
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the JSON schema {path}: {error}") from error
    if not isinstance(schema, dict):
        raise OptionError(f"{path} is no JSON schema: it must be an object")
    return schema
