"""`medusa-export doctor`."""

from __future__ import annotations

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(*, as_json: bool) -> None:
    """Tell what is installed here, which GPUs there are, and so what can be exported, built and run.

    What cannot is told with the reason and, where a package is missing, with the command that installs it. Always ends with
    exit code 0: it judges nothing but what is here.
    """
    from medusa_export.console import stdout_console
    from medusa_export.doctor import report
    from medusa_export.doctor.facts import find_facts
    from medusa_export.doctor.verdicts import verdicts
    from medusa_runtime.bundle.files import json_text

    facts = find_facts()
    found = verdicts(facts)
    if as_json:
        click.echo(json_text(report.as_json(facts, found), indent=1))
    else:
        report.show(facts, found, stdout_console())
