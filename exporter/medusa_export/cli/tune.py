"""`medusa-export tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.command_options.shared_options import decodes_a_bundle
from medusa_runtime.errors import OptionError

QUICK: dict[str, Any] = {"rounds": 2, "default_batch_sizes": (1, 4), "lengths": (128,), "max_new_tokens": 32}


def _sizes(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        found = (0,)
    if any(not 1 <= size <= 4096 for size in found):
        raise OptionError(f"--{(parameter.name or '').replace('_', '-')} is {text!r}; it must be numbers such as 1,4,16")
    return found


@click.command("tune")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--heads", type=click.Path(path_type=Path), help="Heads with an evaluation.json to take their accuracy from.")
@click.option("--evaluation", type=click.Path(path_type=Path), help="Or that file itself.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Text, one a line, or JSON lines. [default: some of our own]")
@click.option("--batch-sizes", callback=_sizes, help="Sequences decoded at a time. [default: 1,2,4,8,16]")
@click.option("--max-nodes", type=click.IntRange(2, 1024), default=64, show_default=True, help="The largest tree tried.")
@click.option("--lengths", callback=_sizes, help="Cached tokens at which steps are measured. [default: 128,512]")
@click.option("--max-new-tokens", type=click.IntRange(8), help="A prompt's answer. [default: 64]")
@click.option("--quick", is_flag=True, help="Rougher, in a fifth of the time: two batch sizes, one length, fewer rounds.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what was found to this file, too.")
@decodes_a_bundle
def command(bundle: Path, *, quick: bool, json_file: Path | None, **options: Any) -> None:
    """Find the trees with which BUNDLE gives most tokens a second on this machine, and keep them in it.

    Measures what steps cost against their tokens, and how often drafts are accepted: by decoding prompts, or from an evaluation
    of the heads. What is found is checked by decoding, with prompt lookup and without, and kept as tuning.json; MedusaLM and
    `generate` use it on this device.
    The machine should do nothing else meanwhile. A minute or two for a small model.
    """
    from rich.console import Console

    from medusa_export.tune.report import show
    from medusa_export.tune.run import TuneOptions, tune
    from medusa_runtime.bundle.files import write_whole

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise OptionError(f"{json_file} cannot be written: there is no directory {json_file.parent}")
    given = {name: value for name, value in options.items() if value not in (None, ())}
    device, found = tune(TuneOptions(bundle=bundle, **((QUICK if quick else {}) | given)))
    if json_file is not None:
        write_whole(json_file, found.model_dump_json(indent=1, exclude_none=True) + "\n")
    show(device, found, Console(highlight=False))
