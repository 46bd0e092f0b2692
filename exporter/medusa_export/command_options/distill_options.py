"""The options of `medusa-export distill`, which are the fields of a recipe's section too."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.command_options.shared_options import combined, cuda_graphs_option, threads_option, trust_remote_code_option

distill_options = combined(
    click.option(
        "--prompts",
        multiple=True,
        type=click.Path(path_type=Path),
        help="A file of prompts: JSON lines (prompt, turns or messages), or text with one a line. May be given several times.",
    ),
    click.option("--self-prompts", type=click.IntRange(min=0), default=0, help="Prompts that the model writes itself."),
    click.option(
        "-o",
        "--output",
        required=True,
        type=click.Path(path_type=Path),
        help="The data's directory; an interrupted run goes on there.",
    ),
    click.option(
        "--mix",
        multiple=True,
        metavar="SOURCE=N",
        help="Take at most N prompts of this source, and none of those not named; * fits any letters.",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Take at most so many prompts, at random."),
    click.option(
        "--max-tokens", type=click.IntRange(min=1), help="Stop once the data holds so many tokens; a higher number goes on."
    ),
    click.option("--max-new-tokens", type=click.IntRange(1, 32768), default=256, show_default=True, help="Of an answer."),
    click.option(
        "--max-prompt-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Longer prompts are skipped."
    ),
    click.option("--temperature", type=click.FloatRange(0, 5), default=0.0, show_default=True, help="Of answers; 0 is greedy."),
    click.option(
        "--prompt-temperature",
        type=click.FloatRange(0, 5, min_open=True),
        default=0.8,
        show_default=True,
        help="Of the model's own prompts.",
    ),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option(
        "--backend",
        type=click.Choice(["auto", "transformers", "bundle", "endpoint"]),
        default="auto",
        show_default=True,
        help="Who answers: PyTorch, a bundle with Medusa (on what runs it best here), or an OpenAI-compatible endpoint.",
    ),
    click.option("--base-url", help="The endpoint, such as http://localhost:8000/v1; MODEL then gives the tokenizer."),
    click.option("--served-model", help="The endpoint's name for the model. [default: MODEL]"),
    click.option("--batch-size", type=click.IntRange(1, 4096), help="Answers made side by side. [default: 64; bundle: 8]"),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
        default="auto",
        show_default=True,
        help="Of the weights, for transformers. auto: bf16 where the hardware multiplies it, else fp32.",
    ),
    click.option("--device", default="auto", show_default=True, help="Of transformers or a bundle: auto, cpu, cuda, cuda:1 …"),
    cuda_graphs_option,
    threads_option,
    trust_remote_code_option,
)
