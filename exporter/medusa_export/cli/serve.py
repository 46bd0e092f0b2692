"""`medusa-export serve`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.fields import options_from, parse
from medusa_export.cli.shared_options import decodes_a_bundle
from medusa_runtime.bundle.cpu import Spin
from medusa_serve.settings import ServerSettings


@click.command("serve", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@options_from(ServerSettings)
@click.option("--max-batch-size", type=click.IntRange(1), help="Answers decoded at a time. [default: 8, or fewer]")
@click.option(
    "--max-queue", type=click.IntRange(0), default=128, show_default=True, help="Answers that may wait; more get status 429."
)
@click.option("--allow-failed", is_flag=True, help="Serve a bundle even though its validation failed.")
@decodes_a_bundle
def command(
    bundle: Path,
    *,
    max_batch_size: int | None,
    max_queue: int,
    allow_failed: bool,
    allow_engine_code: bool,
    backend: str,
    device: str,
    cuda_graphs: bool | None,
    threads: int,
    spin: Spin,
    **fields: Any,
) -> None:
    """Serve BUNDLE over HTTP, as OpenAI's API: chat, completions, responses, metrics, and a page to try it.

    Other machines cannot use it, unless --host says otherwise. After SIGTERM, requests have --grace seconds to end.
    """
    from medusa_export.placement import place
    from medusa_runtime import Manifest, MedusaLM
    from medusa_serve.run import serve
    from medusa_serve.state import ServedBundle

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    settings = parse(ServerSettings, fields)
    manifest = Manifest.load(bundle)
    placement = place(manifest, backend, device, threads=threads, spin=spin, cuda_graphs=cuda_graphs)

    def open_model() -> MedusaLM:
        return MedusaLM.from_bundle(
            bundle,
            placement.backend,
            device=placement.device,
            max_batch_size=max_batch_size,
            max_queue=max_queue,
            num_threads=threads,
            spin=spin,
            cuda_graphs=cuda_graphs,
            allow_failed=allow_failed,
            allow_engine_code=allow_engine_code,
        )

    if not settings.is_local and settings.api_key_file is None:
        click.echo("Warning: other machines can use this server without a key; see --api-key-file", err=True)
    serve(settings, ServedBundle(manifest, placement, open_model), lambda line: click.echo(line, err=True))
