"""`medusa-export train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.cli.fields import options_from, parse
from medusa_export.command_options.shared_options import exclude_option, force_option, threads_option, trust_remote_code_option
from medusa_heads.train.settings import TrainSettings


@click.command("train")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="What `distill` made, or JSON lines of messages. May be given several times.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The heads' directory, a new one.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Checkpoints and log; a stopped run goes on there. [default: OUTPUT.work]"
)
@click.option(
    "--hidden",
    type=click.Path(path_type=Path),
    help="Keep hidden states here, for later runs. [default: kept until heads are made]",
)
@exclude_option
@click.option("--plot", is_flag=True, help="Draw the curves into the output.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 … With several processes: auto.")
@options_from(TrainSettings)
@force_option
@threads_option
@trust_remote_code_option
def command(
    model: str,
    data: tuple[Path, ...],
    output: Path,
    work: Path | None,
    hidden: Path | None,
    exclude: tuple[Path, ...],
    device: str,
    threads: int,
    *,
    plot: bool,
    force: bool,
    trust_remote_code: bool,
    **settings: Any,
) -> None:
    """Train Medusa heads for MODEL on its own answers.

    Several processes share the work: `accelerate launch --num_processes 2 -m medusa_export train …`; on CPUs, that takes
    --multi_gpu all the same. A run that was stopped goes on under the same command.
    """
    from medusa_export.head_training.training import TrainOptions, train

    options = TrainOptions(
        model,
        data,
        output,
        parse(TrainSettings, settings),
        work,
        hidden,
        exclude,
        device,
        threads,
        plot,
        force,
        trust_remote_code,
    )
    if train(options):
        click.echo(output)
