"""`medusa-export diff`."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.json_options import json_option

DIFFERENT = 3


@click.command("diff", cls=Command)
@click.argument("first", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.argument("second", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--exit-code", is_flag=True, help=f"Exit with {DIFFERENT} if the content differs.")
@json_option
def command(first: Path, second: Path, *, exit_code: bool, as_json: bool) -> None:
    """Compare two bundles: model, heads, tree, limits and quality, the digests of their files, and how they were judged.

    It reads the manifests and tunings alone, and needs neither PyTorch nor a GPU. Validation, tuning and provenance are shown,
    but two bundles that differ in nothing else have the same content.
    """
    from medusa_export.console import stdout_console
    from medusa_export.report.bundle_report import report_of
    from medusa_export.report.difference import difference, show
    from medusa_runtime.bundle.files import json_text

    found = difference(report_of(first), report_of(second))
    if as_json:
        click.echo(json_text(found.model_dump(mode="json", exclude_none=True), indent=1))
    else:
        show(found, stdout_console())
    if exit_code and not found.same_content:
        click.get_current_context().exit(DIFFERENT)
