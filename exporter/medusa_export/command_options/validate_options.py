"""The options of `medusa-export validate`. They are also the fields of a recipe's section."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.command_options.shared_options import combined, decodes_a_bundle, trust_remote_code_option

validate_options = combined(
    click.option(
        "--reference", required=True, help="The model that BUNDLE was made from: a directory, a hub id or a GGUF file."
    ),
    click.option(
        "--heads", type=click.Path(path_type=Path), help="The heads that BUNDLE was made from, to compare them as well."
    ),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        help="A file of prompts: JSON lines (prompt, turns or messages), or text with one per line. [default: built-in ones]",
    ),
    click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=48, show_default=True, help="Tokens to decode per prompt."
    ),
    decodes_a_bundle,
    trust_remote_code_option,
)
