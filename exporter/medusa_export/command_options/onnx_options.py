"""The options of `medusa-export onnx`, which are the fields of a recipe's section too."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.command_options.shared_options import (
    SCHEMES,
    activation_bits_option,
    combined,
    force_option,
    max_kl_option,
    trust_remote_code_option,
)

onnx_options = combined(
    click.option("--heads", required=True, type=click.Path(path_type=Path), help="Heads made for MODEL (see: heads init)."),
    click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle's directory, a new one."),
    click.option("--dtype", "precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True),
    click.option("--opset", type=int, default=24, show_default=True, help="ONNX operator set; 24 is the least."),
    click.option("--max-seq-len", type=click.IntRange(min=2), help="Prompt and answer together. [default: the model's own]"),
    click.option("--head-top-k", type=click.IntRange(min=1), help="Candidates a head returns. [default: 32]"),
    click.option("--full-head-vocabulary", is_flag=True, help="Let heads guess tokens, too, that they were not trained on."),
    click.option(
        "--tree",
        type=click.Path(path_type=Path),
        help="The bundle's candidate tree, as JSON. [default: by the heads' evaluation]",
    ),
    click.option(
        "--tree-nodes", type=click.IntRange(2, 1024), default=16, show_default=True, help="Size of that default tree."
    ),
    click.option("--quantize", "scheme", type=click.Choice(SCHEMES), help="Round the weights; see: quantize. [default: not]"),
    activation_bits_option,
    max_kl_option,
    click.option("--validate/--no-validate", default=True, show_default=True, help="Compare with PyTorch afterwards."),
    force_option,
    trust_remote_code_option,
)
