"""`medusa-export distill`."""

from __future__ import annotations

import re
from typing import Any

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.fields import options_from, parse
from medusa_export.command_options.distill_options import DistillOptions


@click.command("distill", cls=Command)
@click.argument("model")
@options_from(DistillOptions, leave_out={"model", "mix"})
@click.option(
    "--mix",
    multiple=True,
    metavar="SOURCE=N",
    help="At most N prompts from SOURCE; sources not named are dropped. SOURCE may contain *.",
)
def command(mix: tuple[str, ...], **values: Any) -> None:
    """Have MODEL (a checkpoint or a bundle) answer prompts: training data for its heads.

    Run the same command again to continue an interrupted run: no answer is repeated or lost.
    """
    options = parse(DistillOptions, values | {"mix": _parse_mix(mix)})
    from medusa_export.head_training.distillation import distill
    from medusa_export.progress import note

    click.echo(distill(options))
    note(f"next: medusa-export train {options.model} --data {options.output} -o HEADS")


def _parse_mix(mix: tuple[str, ...]) -> dict[str, int]:
    parsed = {}
    for entry in mix:
        if not (found := re.fullmatch(r"(.+)=0*([1-9][0-9]{0,8})", entry, re.DOTALL)):
            raise click.BadParameter(f"{entry!r} is not SOURCE=N, with N at least 1", param_hint="--mix")
        parsed[found[1]] = int(found[2])
    return parsed
