"""The options of `medusa-export onnx`. They are also the fields of a recipe's section."""

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
    verbose_option,
)

onnx_options = combined(
    click.option(
        "--heads",
        type=click.Path(path_type=Path),
        help="Heads made for MODEL: directory, file or hub id, in any known format. [default: those in MODEL, if it has any]",
    ),
    click.option(
        "-o",
        "--output",
        required=True,
        type=click.Path(path_type=Path),
        help="Directory for the bundle; it must not exist yet.",
    ),
    click.option("--dtype", "precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True),
    click.option("--opset", type=int, default=24, show_default=True, help="ONNX operator set, 24 or 25."),
    click.option(
        "--max-seq-len",
        type=click.IntRange(min=2),
        help="Longest prompt plus answer, in tokens. [default: the model's own limit]",
    ),
    click.option("--head-top-k", type=click.IntRange(min=1), help="Candidates that each head returns. [default: 32]"),
    click.option("--full-head-vocabulary", is_flag=True, help="Let heads also guess tokens that they were not trained on."),
    click.option(
        "--tree",
        type=click.Path(path_type=Path),
        help="The bundle's candidate tree, a JSON file. [default: the best one in the heads' evaluation]",
    ),
    click.option(
        "--tree-nodes", type=click.IntRange(2, 1024), default=16, show_default=True, help="Nodes of the default tree."
    ),
    click.option(
        "--quantize", "scheme", type=click.Choice(SCHEMES), help="Quantise the weights (see `quantize`). [default: no]"
    ),
    activation_bits_option,
    max_kl_option,
    click.option("--validate/--no-validate", default=True, show_default=True, help="Compare with PyTorch afterwards."),
    force_option,
    trust_remote_code_option,
    verbose_option,
)
