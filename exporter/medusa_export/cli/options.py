"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from medusa_runtime.backends.choosing import BACKENDS
from medusa_runtime.bundle.cpu import max_threads

Function = Callable[..., Any]

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
threads_option = click.option(
    "--threads", type=click.IntRange(0, max_threads()), default=0, help="CPU threads. [default: one for each core]"
)
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


def runs_a_bundle(function: Function) -> Function:
    """Add the options that say where a bundle runs: backend, device and CPU threads."""
    return backend_option(device_option(threads_option(function)))


def decodes_a_bundle(function: Function) -> Function:
    """Add those, and what a GPU may do beside when it decodes."""
    return runs_a_bundle(cuda_graphs_option(function))
