"""Options for results as JSON."""

from __future__ import annotations

from pathlib import Path

import click

STDOUT = Path("-")  # as the name of a file for results
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
json_file_option = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the result to this file; - prints it, and no table."
)
bundle_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the facts of the new bundle as one JSON object, as `inspect` does."
)


def print_bundle(bundle: Path, *, as_json: bool) -> None:
    """Print the result of a command that made a bundle: its facts, or its place."""
    if not as_json:
        click.echo(bundle)
        return
    from medusa_export.report.bundle_report import as_data, report_of
    from medusa_runtime.bundle.files import json_text

    click.echo(json_text(as_data(report_of(bundle)), indent=1))
