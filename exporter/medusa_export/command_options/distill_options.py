"""The options of `medusa-export distill`. They are also the fields of a recipe's section."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.command_options.shared_options import combined, cuda_graphs_option, threads_option, trust_remote_code_option

distill_options = combined(
    click.option(
        "--prompts",
        multiple=True,
        type=click.Path(path_type=Path),
        help="A file of prompts: JSON lines (prompt, turns or messages), or text with one prompt per line. May be repeated.",
    ),
    click.option(
        "--self-prompts", type=click.IntRange(min=0), default=0, help="Number of prompts that the model writes itself."
    ),
    click.option(
        "-o",
        "--output",
        required=True,
        type=click.Path(path_type=Path),
        help="Directory for the data. An interrupted run continues there.",
    ),
    click.option(
        "--mix",
        multiple=True,
        metavar="SOURCE=N",
        help="At most N prompts from SOURCE; sources not named are dropped. SOURCE may contain *.",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="At most this many prompts, chosen at random."),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        help="Stop once the data holds this many tokens. A later run with a higher number continues.",
    ),
    click.option("--max-new-tokens", type=click.IntRange(1, 32768), default=256, show_default=True, help="Longest answer."),
    click.option(
        "--max-prompt-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Longer prompts are skipped."
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(0, 5),
        default=0.0,
        show_default=True,
        help="Temperature of answers; 0 is greedy.",
    ),
    click.option(
        "--prompt-temperature",
        type=click.FloatRange(0, 5, min_open=True),
        default=0.8,
        show_default=True,
        help="Temperature of the prompts that the model writes.",
    ),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option(
        "--backend",
        type=click.Choice(["auto", "transformers", "bundle", "endpoint"]),
        default="auto",
        show_default=True,
        help="What answers: PyTorch, a bundle with Medusa, or an OpenAI-compatible endpoint.",
    ),
    click.option("--base-url", help="Endpoint's address, such as http://localhost:8000/v1. MODEL then gives the tokenizer."),
    click.option("--served-model", help="The endpoint's name for the model. [default: MODEL]"),
    click.option(
        "--batch-size", type=click.IntRange(1, 4096), help="Answers decoded at the same time. [default: 64; bundle: 8]"
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
        default="auto",
        show_default=True,
        help="Precision of the weights, with transformers. auto: bf16 if the hardware computes in it, else fp32.",
    ),
    click.option(
        "--device", default="auto", show_default=True, help="Device for transformers or a bundle: auto, cpu, cuda, cuda:1 …"
    ),
    cuda_graphs_option,
    threads_option,
    trust_remote_code_option,
)
