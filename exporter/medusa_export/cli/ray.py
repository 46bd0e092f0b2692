"""`medusa-export ray`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.fields import options_from, parse
from medusa_serve.ray_settings import PROXYS, QUIET, RaySettings
from medusa_serve.settings import ServerSettings


@click.command("ray", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--replicas", "num_replicas", type=click.IntRange(1), help="Number of replicas. [default: 1]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address on which Ray's proxy listens.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port on which it listens; 0 for any free one.",
)
@options_from(RaySettings, leave_out={"bundle", "num_replicas", *PROXYS})
def command(bundle: Path, *, host: str, port: int, **fields: Any) -> None:
    """Serve BUNDLE over HTTP by several replicas on Ray Serve, with the API of `medusa-export serve`.

    It joins the Ray cluster of this machine or of RAY_ADDRESS. If there is none, it starts Ray on this machine.
    """
    door = ServerSettings(host=host, port=port)
    if not door.is_local and not fields["trusted_host"]:
        fields["trusted_host"] = ("*",)
    settings = parse(RaySettings, {"bundle": bundle, **fields})

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from medusa_serve.ray_run import serve_on_ray

    if not door.is_local and settings.api_key_file is None:
        click.echo("Warning: other machines can use this server without a key; see --api-key-file", err=True)
    serve_on_ray(settings, door, lambda line: click.echo(line, err=True))
