"""`medusa-export heads`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medusa_export.cli.commands import Group
from medusa_export.cli.heads_files import convert, inspect
from medusa_export.cli.shared_options import exclude_option, force_option, threads_option, trust_remote_code_option

if TYPE_CHECKING:
    from medusa_heads.replay import Evaluation


@click.group("heads", cls=Group)
def command() -> None:
    """Make, inspect, convert and evaluate Medusa heads."""


@command.command("init")
@click.argument("model")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory for the heads; it must not exist yet."
)
@click.option("--num-heads", type=click.IntRange(1, 32), default=4, show_default=True)
@click.option("--num-layers", type=click.IntRange(1, 8), default=1, show_default=True, help="Residual blocks per head.")
@click.option("--own-lm-head", is_flag=True, help="Give each head its own LM head, initialised from the model's.")
@click.option(
    "--read-root/--no-read-root", default=True, help="Heads also read the last decided token; the paper's do not. [default]"
)
@force_option
@trust_remote_code_option
def init(
    model: str,
    output: Path,
    num_heads: int,
    num_layers: int,
    *,
    own_lm_head: bool,
    read_root: bool,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Make untrained heads for MODEL. They start as copies of its LM head: they guess badly, but the output stays right."""
    from medusa_export.model.checkpoint import load_backbone
    from medusa_export.progress import stage
    from medusa_heads.config import HeadsConfig
    from medusa_heads.directories import require_new
    from medusa_heads.formats import native, save_heads
    from medusa_heads.modules import MedusaHeads

    require_new(output, native.is_alone, force=force, inputs=(model,))
    with stage(f"load {model}"):
        backbone = load_backbone(model, trust_remote_code=trust_remote_code)
    config = HeadsConfig(
        base_model=backbone.facts.name,
        num_heads=num_heads,
        num_layers=num_layers,
        hidden_size=backbone.facts.hidden_size,
        vocab_size=backbone.facts.vocab_size,
        shared_lm_head=not own_lm_head,
        reads_root=read_root,
    )
    heads = MedusaHeads(config)
    heads.start_from(backbone.model.get_output_embeddings())
    save_heads(heads, output, force=force)
    click.echo(output)


@command.command("evaluate")
@click.argument("heads", type=click.Path(path_type=Path))
@click.option(
    "--model", required=True, help="The model that the heads were made for; after medusa-2, the one trained with them."
)
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="The model's answers, in the form that `train` takes.",
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, min_open=True),
    help="Use only the answers that training with this --held-out left out. [default: all]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use at most this many answers.")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Longer conversations are cut to this many tokens, as in training.",
)
@click.option(
    "--tree",
    "trees",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File with a tree to evaluate, as JSON. May be repeated.",
)
@click.option(
    "--nodes", multiple=True, type=click.IntRange(2, 1024), help="Tree sizes to search, in nodes. [default: 4 8 16 32 64]"
)
@click.option("--hidden", type=click.Path(path_type=Path), help="Keep hidden states in this directory, for another evaluation.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "fp16", "bf16"]), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the JSON to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Plot the accuracies to this PNG file.")
@threads_option
@trust_remote_code_option
def evaluate(*, as_json: bool, output: Path | None, plot: Path | None, nodes: tuple[int, ...], **options: Any) -> None:
    """Measure how often HEADS are right on held-out answers, and how many tokens per step candidate trees then give.

    Each row of the table is a head; head 1 guesses the token after the next one. If the output is written to the heads'
    directory as `evaluation.json`, `medusa-export onnx` takes the bundle's tree from it.
    """
    from medusa_export.head_training.evaluation import EvaluateOptions
    from medusa_export.head_training.evaluation import evaluate as judge
    from medusa_heads.replay import TREE_NODES
    from medusa_runtime.bundle.files import write_whole
    from medusa_runtime.errors import OptionError

    for target in filter(None, (output, plot)):
        if not target.absolute().parent.is_dir():
            raise OptionError(f"{target} cannot be written: there is no directory {target.parent}")
    if plot:
        from medusa_export.plots import accuracy_curves

        if plot.suffix.lower() != ".png":
            raise OptionError(f"--plot {plot}: the plot is a PNG; give it a name that ends in .png")
    result = judge(EvaluateOptions(nodes=nodes or TREE_NODES, **options))
    if output:
        write_whole(output, result.model_dump_json(indent=1) + "\n")
    if plot:
        accuracy_curves(result.model_dump(), plot)
    if as_json:
        click.echo(result.model_dump_json(indent=1))
    else:
        _print_evaluation(result)


def _print_evaluation(result: Evaluation) -> None:
    from rich.table import Table

    from medusa_export.console import stdout_console

    console = stdout_console()
    console.print(f"{result.answers} answers, {result.tokens} tokens")
    ranks = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    accuracy = Table("head", *(f"top-{rank}" for rank in ranks))
    for k in range(len(result.accuracy)):
        accuracy.add_row(str(k + 1), *(f"{result.top(k, rank):.3f}" for rank in ranks))
    console.print(accuracy)
    trees = Table("tree nodes", "tokens/step", "if heads were independent")
    for tree in result.trees:
        trees.add_row(str(tree.nodes), f"{tree.tokens_per_step:.3f}", f"{tree.expected:.3f}")
    console.print(trees)
    if not result.sources:
        return
    sources = Table("source", "answers", "tokens", f"tokens/step, {result.sources[0].nodes} nodes", "tokens never guessed")
    for found in result.sources:
        guessed = f"{100 * found.not_guessed:.1f}%"
        sources.add_row(found.source or "-", str(found.answers), str(found.tokens), f"{found.tokens_per_step:.3f}", guessed)
    console.print(sources)


@command.command("ngrams")
@click.argument("heads", type=click.Path(path_type=Path))
@click.option(
    "--model", required=True, help="The model that the heads were made for; after medusa-2, the one trained with them."
)
@click.option(
    "--data", required=True, multiple=True, type=click.Path(path_type=Path), help="The data that the heads were trained on."
)
@exclude_option
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.02,
    show_default=True,
    help="Part of the answers held out, as in training. They decide how much the n-grams of the others are trusted.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Longer conversations are cut to this many tokens, as in training.",
)
@click.option("--dtype", type=click.Choice(["auto", "fp32", "fp16", "bf16"]), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@threads_option
@trust_remote_code_option
def ngrams(**options: Any) -> None:
    """Count which tokens follow which in the answers that HEADS were trained on; the counts correct independent guesses.

    The file is written to the heads' directory, and `medusa-export onnx` copies it into the bundle. `medusa-export train`
    already makes one; use this command for older heads, or with more answers.
    """
    from medusa_export.head_training.draft_ngrams import NGramOptions, make_ngrams

    click.echo(make_ngrams(NGramOptions(**options)))


command.add_command(inspect)
command.add_command(convert)
