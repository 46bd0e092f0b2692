"""`medusa-export heads inspect` and `heads convert`: what is in a file of heads, and other files of the same heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.shared_options import force_option, trust_remote_code_option

if TYPE_CHECKING:
    from medusa_heads.modules import MedusaHeads
    from medusa_runtime.bundle.manifest import Precision

FORMATS = (  # `medusa_heads.formats.NAMES`, which is not imported for --help
    "medusa-export", "medusa-0.1", "medusa-1.0", "medusa-v2", "vllm", "tgi", "modelopt", "tensorrt-llm", "mlc", "axolotl",
    "hydra",
)  # fmt: skip


@click.command("inspect", cls=Command)
@click.argument("heads", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(heads: Path, *, as_json: bool) -> None:
    """Print the format, the configuration and the tensors of HEADS: a directory, a file, a merged checkpoint or a hub id."""
    from rich.table import Table

    from medusa_export.console import stdout_console
    from medusa_export.progress import note
    from medusa_heads.formats import read_heads
    from medusa_heads.formats.converting import lm_heads_of
    from medusa_runtime.bundle.files import json_text

    flavour, loaded = read_heads(heads, note)
    state = loaded.state_dict()
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")} for name, tensor in state.items()
    }
    facts = {"format": flavour} | loaded.config.model_dump() | {"lm_heads": lm_heads_of(loaded)}
    facts["draft_vocab_size"] = None if loaded.draft_ids is None else len(loaded.draft_ids)
    facts["num_parameters"] = sum(tensor.numel() for tensor in state.values())
    if as_json:
        click.echo(json_text(facts | {"tensors": tensors}, indent=2))
        return
    console = stdout_console()
    for name, value in facts.items():
        console.print(f"{name:16} {value}", markup=False)
    table = Table("tensor", "shape", "dtype")
    for name, facts_ in tensors.items():
        table.add_row(name, str(facts_["shape"]), str(facts_["dtype"]))
    console.print(table)


@click.command("convert", cls=Command)
@click.argument("heads", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory for the heads; it must not exist yet."
)
@click.option("--format", "flavour", required=True, type=click.Choice(FORMATS), help="The format to write.")
@click.option(
    "--model",
    help="The heads' model: its LM head is written where the format wants one, and all of it into a merged checkpoint.",
)
@force_option
@trust_remote_code_option
def convert(heads: Path, output: Path, flavour: str, model: str | None, *, force: bool, trust_remote_code: bool) -> None:
    """Write HEADS, of any format, in another one. Tensors stay as they are, bit for bit.

    If a format cannot hold these heads (because they read the root token, say), that is an error.
    """
    from medusa_export.progress import note
    from medusa_heads.formats import load_heads
    from medusa_heads.formats.converting import convert as write
    from medusa_heads.formats.converting import require_convertible, require_same_size

    require_convertible(flavour, None if model is None else Path(model))
    loaded = load_heads(heads, note)

    def lm_head() -> Any:
        assert model is not None
        found = _lm_head(model, loaded, trust_remote_code=trust_remote_code)
        require_same_size(loaded, heads, found, model)
        return found

    place = None if model is None else Path(model)
    write(loaded, output, flavour, model=place, lm_head=None if model is None else lm_head, force=force)
    click.echo(output)


def _lm_head(model: str, heads: MedusaHeads, *, trust_remote_code: bool) -> Any:
    """The model's LM head, in the precision of the heads."""
    from medusa_export.model.checkpoint import DTYPES, load_backbone

    dtype = next(heads.parameters()).dtype
    precisions: list[Precision] = [name for name, known in DTYPES.items() if known == dtype]
    return load_backbone(model, *precisions[:1], trust_remote_code=trust_remote_code).model.get_output_embeddings()
