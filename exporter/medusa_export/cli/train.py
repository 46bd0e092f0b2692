"""`medusa-export train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.fields import options_from, parse
from medusa_export.cli.shared_options import exclude_option, force_option, threads_option, trust_remote_code_option
from medusa_heads.train.settings import TrainSettings


@click.command("train", cls=Command)
@click.argument("model")
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Output of `distill`, or JSON lines of messages. May be repeated.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory for the heads; it must not exist yet."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Directory for checkpoints and the log. A stopped run continues there. [default: OUTPUT.work]",
)
@click.option(
    "--hidden",
    type=click.Path(path_type=Path),
    help="Keep hidden states in this directory for later runs. [default: deleted once the heads are made]",
)
@exclude_option
@click.option("--plot", is_flag=True, help="Plot the training curves to a file in the output.")
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 … Leave it at auto with several processes."
)
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

    To share the work among several processes: `accelerate launch --num_processes 2 -m medusa_export train …`; accelerate needs
    --multi_gpu for that on CPUs too. Run the same command again to continue a stopped run.
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
