"""`medusa-export tune`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from medusa_export.cli.commands import Command
from medusa_export.cli.json_options import STDOUT, json_file_option
from medusa_export.cli.shared_options import decodes_a_bundle
from medusa_runtime.errors import OptionError

QUICK: dict[str, Any] = {
    "rounds": 3,
    "max_seconds": 15.0,
    "default_batch_sizes": (1, 4),
    "lengths": (128,),
    "max_new_tokens": 32,
}


def _sizes(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        found = (0,)
    if any(not 1 <= size <= 4096 for size in found):
        raise OptionError(f"--{(parameter.name or '').replace('_', '-')} is {text!r}; it must be numbers such as 1,4,16")
    return found


def _finite(_: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise OptionError(f"--{(parameter.name or '').replace('_', '-')} is {value}; it must be a finite number")
    return value


@click.command("tune", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--heads",
    type=click.Path(path_type=Path),
    help="Directory of the heads, if it has an evaluation.json: take their accuracy from it.",
)
@click.option("--evaluation", type=click.Path(path_type=Path), help="Take the heads' accuracy from this evaluation.json.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Text with one prompt per line, or JSON lines. [default: built-in prompts]",
)
@click.option("--batch-sizes", callback=_sizes, help="Batch sizes to tune for. [default: 1,2,4,8,16]")
@click.option(
    "--max-nodes", type=click.IntRange(2, 1024), default=64, show_default=True, help="Nodes of the largest tree to try."
)
@click.option("--lengths", callback=_sizes, help="Cached tokens at which steps are measured. [default: 128,512]")
@click.option("--max-new-tokens", type=click.IntRange(8), help="Tokens to decode per prompt. [default: 64]")
@click.option(
    "--max-noise",
    type=click.FloatRange(min=0),
    callback=_finite,
    help="Time steps in more rounds while they take longer by more than this part in the median than in the fastest quarter "
    "of the rounds. [default: 0.05]",
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0),
    callback=_finite,
    help="Begin no further round after this time, even if the machine is noisy; for the checks, the same time again. "
    "[default: 60]",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Less precise, in a fifth of the time: two batch sizes, one length, fewer rounds, --max-seconds 15.",
)
@json_file_option
@decodes_a_bundle
def command(bundle: Path, *, quick: bool, json_file: Path | None, **options: Any) -> None:
    """Find the candidate trees with which BUNDLE decodes fastest on this machine, and store them in it.

    Measures the time of a step by its number of tokens, and how often drafts are accepted: by decoding prompts, or from an
    evaluation of the heads. The trees are then checked by decoding with them, with and without prompt lookup, and written to
    tuning.json in the bundle. MedusaLM and `generate` use them on this device.

    If decoding is more than 15% faster or slower than predicted, the costs are measured once more. If that does not help,
    nothing is written, an earlier tuning stays, and the exit code is 3.

    Nothing else should run on the machine meanwhile. If it is noisy, steps are timed for longer. A small model takes a minute
    or two, on a busy machine twice that.
    """
    from medusa_export.console import stdout_console
    from medusa_export.measure.tune.keep import require_held
    from medusa_export.measure.tune.run_tune import TuneOptions, tune
    from medusa_export.measure.tune.tune_report import show
    from medusa_runtime.bundle.files import write_whole

    if json_file is not None and json_file != STDOUT and not json_file.absolute().parent.is_dir():
        raise OptionError(f"{json_file} cannot be written: there is no directory {json_file.parent}")
    given = {name: value for name, value in options.items() if value not in (None, ())}
    device, found = tune(TuneOptions(bundle=bundle, **((QUICK if quick else {}) | given)))
    text = found.model_dump_json(indent=1, exclude_none=True)
    if json_file == STDOUT:
        click.echo(text)
    else:
        if json_file is not None:
            write_whole(json_file, text + "\n")
        show(device, found, stdout_console())
    require_held(bundle, found)
