"""`medusa-export distill`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from medusa_export.command_options.distill_options import distill_options


@click.command("distill")
@click.argument("model")
@distill_options
def command(mix: tuple[str, ...], prompts: tuple[Path, ...], **options: Any) -> None:
    """Have MODEL (a checkpoint or a bundle) answer prompts: training data for its heads.

    Run the same command again to continue an interrupted run: no answer is repeated or lost.
    """
    from medusa_export.head_training.distillation import DistillOptions, distill

    click.echo(distill(DistillOptions(mix=_parse_mix(mix), prompts=prompts, **options)))


def _parse_mix(mix: tuple[str, ...]) -> dict[str, int]:
    parsed = {}
    for entry in mix:
        if not (found := re.fullmatch(r"(.+)=0*([1-9][0-9]{0,8})", entry, re.DOTALL)):
            raise click.BadParameter(f"{entry!r} is not SOURCE=N, with N at least 1", param_hint="--mix")
        parsed[found[1]] = int(found[2])
    return parsed
