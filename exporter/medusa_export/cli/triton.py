"""`medusa-export triton`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.shared_options import force_option, runs_a_bundle
from medusa_runtime.bundle.cpu import Spin


@click.command("triton", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "repository",
    required=True,
    type=click.Path(path_type=Path),
    help="Model repository; other models in it stay.",
)
@click.option("--name", help="Name of the model. [default: the bundle's directory]")
@click.option("--max-batch-size", type=click.IntRange(1), help="Answers decoded at a time. [default: 8]")
@click.option(
    "--max-queue", type=click.IntRange(0), default=128, show_default=True, help="Answers that may wait; others are refused."
)
@click.option(
    "--files",
    type=click.Choice(["copy", "path"]),
    default="copy",
    show_default=True,
    help="How the bundle gets into the repository: as a copy, or as its path alone.",
)
@runs_a_bundle
@force_option
def command(
    bundle: Path,
    repository: Path,
    name: str | None,
    max_batch_size: int | None,
    max_queue: int,
    files: Literal["copy", "path"],
    backend: str,
    device: str,
    threads: int,
    spin: Spin,
    *,
    force: bool,
) -> None:
    """Write BUNDLE as a model of an NVIDIA Triton model repository, for Triton's Python backend.

    Backend, device, threads and spin are for the machine on which Triton runs. There, Python needs the package
    medusa-export with the extra serve. Answers are streamed, and requests are decoded side by side.
    """
    from medusa_heads.directories import new_directory
    from medusa_serve.triton import ModelSettings, check_name, is_model, write_model

    name = name or bundle.resolve().name
    check_name(name)
    settings = ModelSettings(
        backend=backend,
        device=device,
        threads=threads,
        spin=spin,
        max_batch_size=max_batch_size,
        max_queue=max_queue,
    )
    with new_directory(repository / name, is_model, force=force, inputs=(bundle,)) as directory:
        write_model(directory, bundle, name, settings, files=files)
    click.echo(repository / name)
