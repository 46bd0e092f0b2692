"""`medusa-export trt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.cli.options import force_option


@click.command("trt")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The engine bundle's directory, a new one."
)
@click.option("--flavor", type=click.Choice(["rtx", "tensorrt"]), default="rtx", show_default=True)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    help="A GPU to build for, such as 8.9; may be given several times. [rtx: 8.9; tensorrt: the GPU here]",
)
@click.option("--max-seq-len", type=int, help="Prompt and answer together. [default: the bundle's own, at most 2048]")
@click.option("--max-batch-size", type=int, default=1, show_default=True)
@click.option("--max-tree-nodes", type=int, default=64, show_default=True, help="Tokens a verification step takes.")
@click.option("--max-prefill-tokens", type=int, default=512, show_default=True, help="Prompt tokens a step takes.")
@force_option
def command(compute_capabilities: tuple[str, ...], **options: Any) -> None:
    """Build TensorRT engines from the ONNX bundle BUNDLE.

    TensorRT-RTX (rtx) builds for the GPUs that are named and needs none itself; full TensorRT (tensorrt) builds for the GPU
    it finds. Precision is the bundle's.
    """
    from medusa_export.progress import note
    from medusa_export.trt.build import build_engines
    from medusa_export.trt.options import EngineOptions

    manifest = build_engines(EngineOptions(compute_capabilities=compute_capabilities, **options))
    for name, facts in manifest.files.items():
        if name.endswith(".plan"):
            note(f"{name}: {facts.size / 1e6:.0f} MB")
    click.echo(options["output"])
