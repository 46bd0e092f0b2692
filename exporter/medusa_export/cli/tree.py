"""`medusa-export tree`."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.cli.commands import Group
from medusa_export.cli.json_options import json_option
from medusa_export.cli.shared_options import runs_a_bundle
from medusa_runtime.bundle.cpu import Spin
from medusa_runtime.errors import OptionError

FORMATS = (".png", ".svg")


@click.group("tree", cls=Group)
def command() -> None:
    """Draw candidate trees."""


@command.command("show")
@click.argument("source", metavar="BUNDLE|TREE.json", type=click.Path(path_type=Path))
@click.option(
    "--evaluation", type=click.Path(path_type=Path), help="An evaluation.json of the heads, with how often they are right."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Show the tree tuned for this batch size."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Also write the drawing to this PNG or SVG file.")
@json_option
@runs_a_bundle
def show(
    source: Path,
    *,
    evaluation: Path | None,
    batch_size: int,
    plot: Path | None,
    backend: str,
    device: str,
    threads: int,
    spin: Spin,
    as_json: bool,
) -> None:
    """Draw a tree: each node with its path of ranks, and the probability that all drafts down to it are right.

    Of a bundle, the tree is the best fixed one tuned for this device, or else the one in the manifest. The probabilities come
    from the tuning, or from --evaluation, which treats the heads as independent; without either, none are shown.
    """
    from medusa_export.console import stdout_console
    from medusa_export.measure.tune.tune_tree import Device, find_tree
    from medusa_runtime.bundle.files import json_text

    if plot is not None:
        from medusa_export.plots import tree_drawing

        if plot.suffix.lower() not in FORMATS:
            raise OptionError(f"--plot {plot}: the name must end in {' or '.join(FORMATS)}")
        if not plot.absolute().parent.is_dir():
            raise OptionError(f"{plot} cannot be written: there is no directory {plot.parent}")
    found = find_tree(source, Device(backend, device, threads, spin), batch_size, evaluation)
    if as_json:
        acceptance = None if found.acceptance is None else [float(chance) for chance in found.acceptance]
        facts = {"source": found.source, **found.tree.to_json(), "acceptance": acceptance, "tokens_per_step": found.expected}
        click.echo(json_text(facts))
    else:
        console = stdout_console()
        console.print(found.source, markup=False, soft_wrap=True)
        console.print(found.drawn())
        if found.expected is not None:
            console.print(f"tokens per step expected: {found.expected:.2f}")
    if plot is not None:
        tree_drawing(found.tree, found.acceptance, plot)
