"""`medusa-export quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.fields import options_from, parse
from medusa_export.cli.json_options import bundle_json_option, print_bundle
from medusa_export.cli.shared_options import trust_remote_code_option
from medusa_export.command_options.quantize_options import QuantizeOptions


@click.command("quantize", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@options_from(QuantizeOptions, leave_out={"bundle"})
@click.option("--reference", help="The model that BUNDLE was made from: validate the result against it in PyTorch afterwards.")
@bundle_json_option
@trust_remote_code_option
def command(*, reference: str | None, trust_remote_code: bool, as_json: bool, **values: Any) -> None:
    """Quantise the weights of BUNDLE to 8 or 4 bits, and measure the loss of quality.

    Perplexity, KL divergence, greedy agreement and tokens per step are written to the new bundle's manifest. Each token of a
    step has its own activation scale, so decoding with and without Medusa gives the same tokens unless two logits are nearly
    equal. With --activation-bits 8, they often differ.
    """
    options = parse(QuantizeOptions, values)
    from medusa_export.progress import note
    from medusa_export.quantize import quantize_bundle

    quantize_bundle(options)
    note(f"wrote {options.output}")
    if reference is not None:
        from medusa_export.check import record
        from medusa_export.check import validate as compare

        record(options.output, compare(options.output, reference, trust_remote_code=trust_remote_code))
    note(f"next: medusa-export tune {options.output}, which finds the trees that are fastest on this machine")
    print_bundle(options.output, as_json=as_json)
