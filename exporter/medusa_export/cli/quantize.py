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
    verbose_option,
)


@click.command("quantize")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory for the new bundle.")
@click.option(
    "--scheme",
    type=click.Choice(SCHEMES),
    default="int8",
    show_default=True,
    help="int8: one scale per output channel, best for wide trees and batches. int8-blocks: one scale per 32 inputs, best for "
    "narrow trees. int4: the layers' weights in 4-bit blocks. int8-int4: only the MLPs' weights in 4-bit blocks.",
)
@activation_bits_option
@max_kl_option
@click.option(
    "--quality-prompts",
    type=click.Path(path_type=Path),
    help="Measure quality on answers to these prompts. [default: built-in prompts]",
)
@click.option("--quality-text", type=click.Path(path_type=Path), help="Measure quality on this plain-text file instead.")
@click.option(
    "--calibration-prompts",
    type=click.Path(path_type=Path),
    help="Find outliers with these prompts. [default: built-in prompts]",
)
@click.option("--reference", help="The model that BUNDLE was made from: validate the result against it in PyTorch afterwards.")
@force_option
@trust_remote_code_option
@verbose_option
def command(
    bundle: Path, output: Path, activation_bits: str | None, reference: str | None, *, trust_remote_code: bool, **options: Any
) -> None:
    """Quantise the weights of BUNDLE to 8 or 4 bits, and measure the loss of quality.

    Perplexity, KL divergence, greedy agreement and tokens per step are written to the new bundle's manifest. Each token of a
    step has its own activation scale, so decoding with and without Medusa gives the same tokens unless two logits are nearly
    equal. With --activation-bits 8, that happens more often.
    """
    from medusa_export.progress import note
    from medusa_export.quantize import QuantizeOptions, quantize_bundle

    quantize_bundle(QuantizeOptions(bundle=bundle, output=output, activation_bits=as_bits(activation_bits), **options))
    note(f"wrote {output}")
    if reference is not None:
        from medusa_export.check import record
        from medusa_export.check import validate as compare

        record(output, compare(output, reference, trust_remote_code=trust_remote_code))
    click.echo(output)
