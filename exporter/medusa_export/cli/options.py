"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_runtime.backends import BACKENDS

force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")
trust_remote_code_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint."
)
backend_option = click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Where the bundle runs."
)
exclude_option = click.option(
    "--exclude",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Texts to evaluate on: answers that share 13 words in a row with them, or their prompts, are left out.",
)
threads_option = click.option("--threads", type=click.IntRange(0, 512), default=0, help="CPU threads. [default: one a core]")
