"""`medusa-export quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.command_options.shared_options import (
    SCHEMES,
    activation_bits_option,
    as_bits,
    force_option,
    max_kl_option,
    trust_remote_code_option,
)


@click.command("quantize")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The new bundle's directory.")
@click.option(
    "--scheme",
    type=click.Choice(SCHEMES),
    default="int8",
    show_default=True,
    help="int8: a scale an output, for wide trees and batches. int8-blocks: a scale for 32 inputs of an output, for narrow "
    "trees. int4: the layers' weights in 4-bit blocks. int8-int4: only the MLPs'.",
)
@activation_bits_option
@max_kl_option
@click.option("--quality-prompts", type=click.Path(path_type=Path), help="Measure on the answers to these. [default: our own]")
@click.option("--quality-text", type=click.Path(path_type=Path), help="Measure on this text instead, a plain file.")
@click.option("--calibration-prompts", type=click.Path(path_type=Path), help="Find outliers with these. [default: our own]")
@click.option("--reference", help="The model BUNDLE was made from: compare the result with it in PyTorch afterwards.")
@force_option
@trust_remote_code_option
def command(
    bundle: Path, output: Path, activation_bits: str | None, reference: str | None, *, trust_remote_code: bool, **options: Any
) -> None:
    """Round the weights of BUNDLE to 8 or 4 bits, and measure what that changes.

    Perplexity, KL divergence, greedy agreement and tokens a step go into the new bundle's manifest. Every token of a step is
    rounded with a scale of its own, so decoding with Medusa gives what decoding without it gives, near ties apart; with
    --activation-bits 8 many are near.
    """
    from medusa_export.progress import note
    from medusa_export.quantize import QuantizeOptions, quantize_bundle

    quantize_bundle(QuantizeOptions(bundle=bundle, output=output, activation_bits=as_bits(activation_bits), **options))
    note(f"wrote {output}")
    if reference is not None:
        from medusa_export.validate import record
        from medusa_export.validate import validate as compare

        record(output, compare(output, reference, trust_remote_code=trust_remote_code))
    click.echo(output)
