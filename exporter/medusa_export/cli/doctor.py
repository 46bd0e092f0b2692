"""`medusa-export doctor`."""

from __future__ import annotations

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.json_options import json_option


@click.command("doctor", cls=Command)
@json_option
def command(*, as_json: bool) -> None:
    """Report what is installed, which GPUs there are, and what can therefore be exported, built and run on this machine.

    For what does not work, it prints the reason, and the command that installs a missing package. The exit code is always 0:
    a missing package is not an error.
    """
    from medusa_export.console import stdout_console
    from medusa_export.doctor import doctor_report as report
    from medusa_export.doctor.machine_facts import find_facts
    from medusa_export.doctor.verdicts import verdicts
    from medusa_runtime.bundle.files import json_text

    facts = find_facts()
    found = verdicts(facts)
    if as_json:
        click.echo(json_text(report.as_json(facts, found), indent=1))
    else:
        report.show(facts, found, stdout_console())
