"""`medusa-export onnx`."""

from __future__ import annotations

from typing import Any

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.fields import options_from, parse
from medusa_export.cli.json_options import bundle_json_option, print_bundle
from medusa_export.command_options.export_options import ExportOptions


@click.command("onnx", cls=Command)
@click.argument("model")
@options_from(ExportOptions, leave_out={"model"})
@click.option("--validate/--no-validate", default=True, show_default=True, help="Compare with PyTorch afterwards.")
@bundle_json_option
def command(*, validate: bool, as_json: bool, **values: Any) -> None:
    """Export MODEL (a directory, a hub id or a GGUF file) with its heads to an ONNX bundle.

    If validation fails, the bundle is kept and marked as failed, and the exit code is 3.
    """
    options = parse(ExportOptions, values)
    from medusa_export.bundle.export import heads_place
    from medusa_export.progress import note
    from medusa_export.quantize import export

    export(options)
    note(f"wrote {options.output}")
    if validate:
        from medusa_export.check import record
        from medusa_export.check import validate as compare

        heads = options.heads or heads_place(options.model, None)
        report = compare(options.output, options.model, heads=heads, trust_remote_code=options.trust_remote_code)
        record(options.output, report)
    then = f"quantize {options.output} -o SMALLER" if options.quantize is None else f"tune {options.output}"
    note(f"next: medusa-export generate {options.output} -p PROMPT, or medusa-export {then}")
    print_bundle(options.output, as_json=as_json)
