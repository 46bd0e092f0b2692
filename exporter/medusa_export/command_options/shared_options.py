"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from medusa_runtime.backends.choosing import BACKENDS

Function = Callable[..., Any]
SCHEMES = ("int8", "int8-blocks", "int4", "int8-int4")

force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")
trust_remote_code_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint."
)
exclude_option = click.option(
    "--exclude",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Texts to evaluate on: answers that share 13 words in a row with them, or their prompts, are left out.",
)
threads_option = click.option("--threads", type=click.IntRange(0, 512), default=0, help="CPU threads. [default: one a core]")
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="What runs the bundle. auto: the best there is for it here.",
)
device_option = click.option("--device", default="auto", show_default=True, help="Where: auto, cpu, cuda, cuda:1 …")
cuda_graphs_option = click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=None,
    help="On a GPU, capture steps and replay them. [default: yes with TensorRT, no with ONNX Runtime]",
)

activation_bits_option = click.option(
    "--activation-bits",
    type=click.Choice(["8", "16"]),
    help="int8: what weights are multiplied with on the CPU; 8 is faster, with outliers moved into the weights. [default: 16]",
)
max_kl_option = click.option(
    "--max-kl",
    type=click.FloatRange(min=0),
    help="Refuse a result whose mean KL divergence from the original is more, in nats.",
)


def runs_a_bundle(function: Function) -> Function:
    """Add the options that say where a bundle runs: backend, device and CPU threads."""
    return backend_option(device_option(threads_option(function)))


def decodes_a_bundle(function: Function) -> Function:
    """Add those, and what a GPU may do beside when it decodes."""
    return runs_a_bundle(cuda_graphs_option(function))


def as_bits(choice: str | None) -> Literal[8, 16] | None:
    """The number that an option's word stands for."""
    return None if choice is None else 8 if choice == "8" else 16


def combined(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Several options as one decorator. `--help` lists them in this order."""

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def declared(options: Callable[[Function], Function]) -> dict[str, click.Parameter]:
    """The options that such a decorator adds, by their parameters' names."""
    return {option.name or "": option for option in click.command()(options(lambda: None)).params}
