"""`medusa-export bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.json_options import STDOUT, json_file_option
from medusa_export.cli.shared_options import decodes_a_bundle
from medusa_export.measure.bench.bench_options import (
    CONTEXT_LENGTHS,
    MODES,
    PREFILL_LENGTHS,
    STEP_WIDTHS,
    USUAL_MODES,
    BenchOptions,
    Sources,
)
from medusa_runtime.bundle.files import json_text, write_whole
from medusa_runtime.errors import MedusaError, OptionError

if TYPE_CHECKING:
    from medusa_export.measure.bench.contest_state import Bench

INTERRUPTED = 130  # a shell's exit code for a command that Ctrl-C ended


class Words(click.ParamType[tuple[str, ...]]):
    """Words separated by commas."""

    name = "words"

    def convert(self, value: Any, _: click.Parameter | None, __: click.Context | None) -> tuple[str, ...]:
        """See click."""
        if isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(word.strip() for word in value.split(",") if word.strip()))


class Sizes(click.ParamType[tuple[int, ...]]):
    """Positive whole numbers separated by commas; the word `none` for an empty list."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """See click."""
        if isinstance(value, tuple):
            return value
        if value.strip() == "none":
            return ()
        try:
            sizes = tuple(sorted({int(word) for word in value.split(",")}))
        except ValueError:
            sizes = (0,)
        if sizes[0] < 1:
            self.fail(f"{value!r}: it must be whole numbers from 1 on, separated by commas, or none", param, ctx)
        return sizes


def _listed(values: tuple[Any, ...]) -> str:
    return ",".join(map(str, values))


@click.command("bench", cls=Command)
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="JSON lines, or text with one prompt per line. [default: built-in prompts]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use only this many of the prompts, spread over all of them.")
@click.option("--max-new-tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Length of every answer.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="How often each prompt is answered.")
@click.option(
    "--modes",
    type=Words(),
    default=_listed(USUAL_MODES),
    show_default=True,
    help="; ".join(f"{name}: {what}" for name, what in MODES.items()) + ".",
)
@click.option(
    "--steps", type=Sizes(), default=_listed(STEP_WIDTHS), show_default=True, help="Measure steps of these widths, in tokens."
)
@click.option(
    "--prefill", type=Sizes(), default=_listed(PREFILL_LENGTHS), show_default=True, help="Measure prompts of these lengths."
)
@click.option(
    "--context",
    type=Sizes(),
    default=_listed(CONTEXT_LENGTHS),
    show_default=True,
    help="Measure steps after this many tokens, and with this much unused room in the cache.",
)
@click.option("--peers", type=Words(), default="", metavar="all|NAME,…", help="Other engines to measure as well.")
@click.option(
    "--peers-python",
    type=click.Path(path_type=Path),
    help="The Python interpreter that has the other engines. [default: this one]",
)
@click.option(
    "--peer-models",
    type=click.Path(path_type=Path),
    help="Directory for models built for other engines. [default: in the user's cache]",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="For other engines: the Hugging Face checkpoint that the bundles were made from, or the name of a fetched model.",
)
@click.option(
    "--heads", type=click.Path(path_type=Path), help="For Medusa in PyTorch: the heads that the bundles were made from."
)
@click.option("--gguf", type=click.Path(path_type=Path), help="For llama.cpp and OpenVINO: the same weights in a GGUF file.")
@click.option("--openvino", type=click.Path(path_type=Path), help="For OpenVINO: the same weights, converted.")
@json_file_option
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write one row per contestant to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write plots (PNG) to this directory.")
@decodes_a_bundle
def command(
    bundles: tuple[Path, ...],
    *,
    checkpoint: Path | None,
    gguf: Path | None,
    heads: Path | None,
    openvino: Path | None,
    json_file: Path | None,
    csv_file: Path | None,
    plot: Path | None,
    **options: Any,
) -> None:
    """Measure decoding with every BUNDLE, with and without Medusa, and with other engines on the same weights.

    All contestants get the same token ids and decode the same number of tokens, greedily and one request at a time. They take
    turns prompt by prompt. Each runs in its own process, which is paused while others are measured. After Ctrl-C, the results
    so far are kept.
    """
    from medusa_export.measure.bench.result import result_of
    from medusa_export.measure.bench.run_bench import measure, prepare

    for target in filter(None, (json_file, csv_file, plot)):
        if target != STDOUT and not target.absolute().parent.is_dir():
            raise OptionError(f"{target} cannot be written: there is no directory {target.parent}")
    if plot and plot.exists() and not plot.is_dir():
        raise OptionError(f"--plot {plot}: plots go into a directory, and this is a file")
    if plot:
        from medusa_export import plots  # noqa: F401 - if its extra is missing, fail now, not after the work
    bench = prepare(BenchOptions(bundles, sources=_sources(checkpoint, gguf, heads, openvino), **options))
    targets = (json_file, csv_file, plot)
    try:
        result = measure(bench)
    except MedusaError:
        if bench.answers:
            _publish(result_of(bench, complete=False), *targets)
        raise
    _publish(result, *targets)
    if not result["complete"]:
        _tell_interrupted(bench, json_file)


def _sources(checkpoint: Path | None, gguf: Path | None, heads: Path | None, openvino: Path | None) -> Sources:
    """What other engines' models are made from. A model that was fetched is known by its name."""
    from medusa_export.model.download import MODELS, fetched

    if checkpoint is not None and str(checkpoint) in MODELS and not checkpoint.exists():
        checkpoint = fetched(str(checkpoint))
    found = {"checkpoint": checkpoint, "gguf": gguf, "heads": heads, "openvino": openvino}
    for name, path in found.items():
        if path is not None and not path.exists():
            raise OptionError(f"--{name} {path}: there is nothing there")
    return Sources(**found)


def _publish(result: dict[str, Any], json_file: Path | None, csv_file: Path | None, plot: Path | None) -> None:
    from medusa_export.measure.bench.bench_report import print_result, write_csv

    if json_file == STDOUT:
        click.echo(json_text(result, indent=1))
    else:
        print_result(result)
    if json_file and json_file != STDOUT:
        write_whole(json_file, json_text(result, indent=1) + "\n")
    if csv_file:
        write_csv(result, csv_file)
    if plot:
        from medusa_export.plots import benchmark

        benchmark(result, plot)


def _tell_interrupted(bench: Bench, json_file: Path | None) -> None:
    kept = f"; the measurements so far are in {json_file}" if json_file and json_file != STDOUT else ""
    click.echo(f"Error: interrupted after {len(bench.answers)} answers{kept}", err=True)
    click.get_current_context().exit(INTERRUPTED)
