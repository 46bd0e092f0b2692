"""`medusa-export validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.fields import options_from, parse
from medusa_export.cli.json_options import json_option
from medusa_export.cli.shared_options import decodes_a_bundle, trust_remote_code_option
from medusa_export.command_options.validate_settings import ValidateSettings
from medusa_runtime.bundle.cpu import Spin


@click.command("validate", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", required=True, help="The model that BUNDLE was made from: a directory, a hub id or a GGUF file.")
@click.option("--heads", type=click.Path(path_type=Path), help="The heads that BUNDLE was made from, to compare them as well.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="A file of prompts: JSON lines (prompt, turns or messages), or text with one per line. [default: built-in ones]",
)
@options_from(ValidateSettings, leave_out={"prompts"})
@decodes_a_bundle
@json_option
@trust_remote_code_option
def command(
    bundle: Path,
    reference: str,
    heads: Path | None,
    prompts: Path | None,
    *,
    backend: str,
    device: str,
    threads: int,
    spin: Spin,
    cuda_graphs: bool | None,
    allow_engine_code: bool,
    trust_remote_code: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compare BUNDLE with the PyTorch model: logits of prompts and tree paths, and greedy decoding token by token.

    An ONNX bundle runs on the CPU unless --device names a GPU, since all its graphs can run there. TensorRT engines run on the
    GPU that they were built for. PyTorch always runs on the CPU, in float32.

    The report is written to validation.json in the bundle. Exit code 3 if a difference exceeds the tolerance.
    """
    from medusa_export.bundle.writable import require_writable
    from medusa_export.check import PROMPTS, record, validate
    from medusa_export.measure.prompt_files import read_prompts
    from medusa_runtime.bundle.files import json_text
    from medusa_runtime.bundle.manifest import REPORT_NAME

    require_writable(bundle, REPORT_NAME)
    report = validate(
        bundle,
        reference,
        heads=heads,
        prompts=read_prompts(prompts) if prompts else PROMPTS,
        max_new_tokens=parse(ValidateSettings, settings).max_new_tokens,
        backend=backend,
        device=device,
        threads=threads,
        spin=spin,
        cuda_graphs=cuda_graphs,
        allow_engine_code=allow_engine_code,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        click.echo(json_text(report.model_dump(mode="json") | {"summary": report.facts().summary}, indent=1))
    record(bundle, report)
