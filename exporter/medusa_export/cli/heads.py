"""`medusa-export heads`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from medusa_export.cli.options import force_option, trust_remote_code_option


@click.group("heads")
def command() -> None:
    """Make and inspect Medusa heads."""


@command.command("init")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The heads' directory, a new one.")
@click.option("--num-heads", type=click.IntRange(1, 32), default=4, show_default=True)
@click.option("--num-layers", type=click.IntRange(1, 8), default=1, show_default=True, help="Residual blocks a head.")
@click.option("--own-lm-head", is_flag=True, help="Give each head an LM head of its own, started from the model's.")
@force_option
@trust_remote_code_option
def init(
    model: str,
    output: Path,
    num_heads: int,
    num_layers: int,
    *,
    own_lm_head: bool,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Make untrained heads for MODEL: they start as its LM head, so they guess badly, but the output stays right."""
    from medusa_export.checkpoint import load_backbone
    from medusa_heads.config import HeadsConfig
    from medusa_heads.formats import native, save_heads
    from medusa_heads.modules import MedusaHeads
    from medusa_runtime.files import require_new

    require_new(output, native.is_alone, force=force, inputs=(model,))
    backbone = load_backbone(model, trust_remote_code=trust_remote_code)
    config = HeadsConfig(
        base_model=backbone.facts.name,
        num_heads=num_heads,
        num_layers=num_layers,
        hidden_size=backbone.facts.hidden_size,
        vocab_size=backbone.facts.vocab_size,
        shared_lm_head=not own_lm_head,
    )
    heads = MedusaHeads(config)
    heads.start_from(backbone.model.get_output_embeddings())
    save_heads(heads, output, force=force)
    click.echo(output)


@command.command("inspect")
@click.argument("heads", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(heads: Path, *, as_json: bool) -> None:
    """Tell what the files of HEADS hold."""
    from rich.console import Console
    from rich.table import Table

    from medusa_heads.formats import load_heads

    loaded = load_heads(heads)
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in loaded.state_dict().items()
    }
    num_parameters = sum(tensor.numel() for tensor in loaded.state_dict().values())
    facts = loaded.config.model_dump() | {"num_parameters": num_parameters}
    if as_json:
        click.echo(json.dumps(facts | {"tensors": tensors}, indent=2))
        return
    console = Console(highlight=False)
    for name, value in facts.items():
        console.print(f"{name:16} {value}", markup=False)
    table = Table("tensor", "shape", "dtype")
    for name, facts_ in tensors.items():
        table.add_row(name, str(facts_["shape"]), str(facts_["dtype"]))
    console.print(table)
