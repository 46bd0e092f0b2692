"""`medusa-export onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.command_options.onnx_options import onnx_options
from medusa_export.command_options.shared_options import as_bits
from medusa_runtime.bundle.manifest import Scheme
from medusa_runtime.errors import OptionError


@click.command("onnx")
@click.argument("model")
@onnx_options
def command(
    model: str,
    output: Path,
    scheme: Scheme | None,
    activation_bits: str | None,
    max_kl: float | None,
    *,
    validate: bool,
    **options: Any,
) -> None:
    """Export MODEL (a directory, a hub id or a GGUF file) with its heads to an ONNX bundle.

    If validation fails, the bundle is kept and marked as failed, and the exit code is 3.
    """
    from medusa_export.bundle.export import ExportOptions, export_bundle, heads_place
    from medusa_export.progress import note

    if scheme is None:
        if max_kl is not None or activation_bits is not None:
            raise OptionError("--max-kl and --activation-bits need --quantize; leave them out, or give --quantize")
        export_bundle(ExportOptions(model=model, output=output, **options))
    else:
        from medusa_export.quantize import QuantizeOptions, export_quantized

        export_quantized(
            ExportOptions(model=model, output=output, **options),
            QuantizeOptions(output, output, scheme, as_bits(activation_bits), max_kl=max_kl, force=options["force"]),
        )
    note(f"wrote {output}")
    if validate:
        from medusa_export.check import record
        from medusa_export.check import validate as compare

        report = compare(
            output, model, heads=options["heads"] or heads_place(model, None), trust_remote_code=options["trust_remote_code"]
        )
        record(output, report)
    click.echo(output)
