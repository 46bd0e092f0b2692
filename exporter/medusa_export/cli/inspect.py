"""`medusa-export inspect`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.json_options import json_option


@click.command("inspect", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Read all files and compare their digests too. Exit code 1 if one differs.")
@json_option
def command(bundle: Path, *, check: bool, as_json: bool) -> None:
    """Report what is in BUNDLE: model, heads, tree, limits, files and sizes, and what quantising, validating and tuning found.

    It reads the bundle alone, and needs neither PyTorch nor a GPU.
    """
    from medusa_export.console import stdout_console
    from medusa_export.progress import stage
    from medusa_export.report.bundle_report import as_data, report_of
    from medusa_export.report.printed import show
    from medusa_runtime.bundle.files import json_text
    from medusa_runtime.errors import BundleError

    with stage("compare the digests of the files") if check else nullcontext():
        report = report_of(bundle, digests=check)
    if as_json:
        click.echo(json_text(as_data(report), indent=1))
    else:
        show(report, stdout_console())
    if check and report.problems:
        raise BundleError(f"{bundle} does not match its manifest: {report.problems[0]}")
