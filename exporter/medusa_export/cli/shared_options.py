"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from medusa_runtime.backends.names import BACKENDS
from medusa_runtime.bundle.cpu import SPINS, max_threads

Function = Callable[..., Any]

force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")
trust_remote_code_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint."
)
exclude_option = click.option(
    "--exclude",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Evaluation texts to keep out of training: drops answers whose text or prompt shares 13 words in a row with them.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(0, max_threads()), default=0, help="CPU threads. [default: one per core]"
)
spin_option = click.option(
    "--spin",
    type=click.Choice(SPINS),
    default="auto",
    show_default=True,
    help="How CPU threads wait for work within a step. on: they spin, for machines that nothing else uses. off: they sleep. "
    "auto: they spin for a moment, which is nearly as fast as on, and better than on beside other programs.",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="Backend that runs the bundle. auto: the fastest one that works here.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device: auto, cpu, cuda, cuda:1 …, or gpu, gpu:1 … (any GPU, through WebGPU)",
)
cuda_graphs_option = click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=None,
    help="On a GPU, capture each step as a CUDA graph and replay it. [default: yes with TensorRT, no with ONNX Runtime]",
)
allow_engine_code_option = click.option(
    "--allow-engine-code", is_flag=True, help="Run the code that version-compatible engines bring. Do so if you trust them."
)


def runs_a_bundle(function: Function) -> Function:
    """Add the options for where a bundle runs: backend, device, CPU threads and how they wait."""
    return backend_option(device_option(threads_option(spin_option(function))))


def decodes_a_bundle(function: Function) -> Function:
    """Add the options of `runs_a_bundle`, CUDA graphs, and what engines may do."""
    return runs_a_bundle(cuda_graphs_option(allow_engine_code_option(function)))
