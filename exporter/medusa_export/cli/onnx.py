"""`medusa-export onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.cli.options import force_option, trust_remote_code_option
from medusa_export.cli.quantize import SCHEMES, activation_bits_option, as_bits, max_kl_option
from medusa_runtime.bundle.manifest import Scheme
from medusa_runtime.errors import OptionError


@click.command("onnx")
@click.argument("model")
@click.option("--heads", required=True, type=click.Path(path_type=Path), help="Heads made for MODEL (see: heads init).")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle's directory, a new one.")
@click.option("--dtype", "precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--opset", type=int, default=24, show_default=True, help="ONNX operator set; 24 is the least.")
@click.option("--max-seq-len", type=click.IntRange(min=2), help="Prompt and answer together. [default: the model's own]")
@click.option("--head-top-k", type=click.IntRange(min=1), help="Candidates a head returns. [default: 32]")
@click.option("--full-head-vocabulary", is_flag=True, help="Let heads guess tokens, too, that they were not trained on.")
@click.option(
    "--tree", type=click.Path(path_type=Path), help="The bundle's candidate tree, as JSON. [default: by the heads' evaluation]"
)
@click.option("--tree-nodes", type=click.IntRange(2, 1024), default=16, show_default=True, help="Size of that default tree.")
@click.option("--quantize", "scheme", type=click.Choice(SCHEMES), help="Round the weights; see: quantize. [default: not]")
@activation_bits_option
@max_kl_option
@click.option("--validate/--no-validate", default=True, show_default=True, help="Compare with PyTorch afterwards.")
@force_option
@trust_remote_code_option
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

    A bundle that fails its validation is kept and marked as failed, and the exit code is 3.
    """
    from medusa_export.export import ExportOptions, export_bundle
    from medusa_export.progress import note

    if scheme is None:
        if max_kl is not None or activation_bits is not None:
            raise OptionError("--max-kl and --activation-bits are for --quantize")
        export_bundle(ExportOptions(model=model, output=output, **options))
    else:
        from medusa_export.quantize import QuantizeOptions, export_quantized

        export_quantized(
            ExportOptions(model=model, output=output, **options),
            QuantizeOptions(output, output, scheme, as_bits(activation_bits), max_kl=max_kl, force=options["force"]),
        )
    note(f"wrote {output}")
    if validate:
        from medusa_export.validate import record
        from medusa_export.validate import validate as compare

        report = compare(output, model, heads=options["heads"], trust_remote_code=options["trust_remote_code"])
        record(output, report)
    click.echo(output)
