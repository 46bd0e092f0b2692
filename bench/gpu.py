"""Measures bundles on a GPU: steps by width, decoding with and without Medusa, the host's share, downloads, and memory.

    python bench/gpu.py BUNDLE... [--checkpoint DIR --heads DIR] [--prompts FILE] [-o bench/results/gpu.json]

Each bundle runs with ONNX Runtime or with the TensorRT that built its engines, with and without CUDA graphs, each time in a new
process. If a checkpoint and its heads are given, the same decoding is measured in PyTorch, eager and compiled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_export.measure.bench.bench_options import STEP_WIDTHS
from medusa_export.measure.bench.bench_prompts import BenchPrompt, load_prompts, of_length
from medusa_export.measure.bench.contest import Answer
from medusa_export.measure.bench.own import OwnDecoding
from medusa_export.measure.bench.process import REQUEST_LOOP, WorkerError, WorkerProcess
from medusa_export.measure.bench.summary import agreement, ratio, summarize
from medusa_runtime import Manifest, MedusaError, choose_backend
from medusa_runtime.backends.gpu.backend import GpuBackend
from medusa_runtime.backends.gpu.devices import find_gpus
from medusa_runtime.text.codec import TextCodec

CONTEXT, REPEATS, WARM_UP = 256, 50, 48
MODES = ("plain", "static", "dynamic")
TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Waits:
    """Adds up the seconds that the host waits for the GPU. The rest of a step is the host's share."""

    def __init__(self, backend: GpuBackend) -> None:
        self.seconds = 0.0
        self._wait = backend.gpu.synchronize
        backend.gpu.synchronize = self._timed  # type: ignore[method-assign] # only for this object

    def _timed(self) -> None:
        started = time.perf_counter()
        self._wait()
        self.seconds += time.perf_counter() - started


def measured(bundle: Path, prompts: list[BenchPrompt], max_new_tokens: int, *, cuda_graphs: bool) -> dict[str, Any]:
    """Measure one bundle in this process."""
    manifest = Manifest.load(bundle)
    place = choose_backend(manifest, device="cuda")
    prompts = [one for one in prompts if len(one.token_ids) + max_new_tokens <= manifest.limits.max_seq_len]
    started = time.perf_counter()
    own = OwnDecoding(str(bundle), 0, place.backend, place.device, cuda_graphs=cuda_graphs)
    opened = time.perf_counter() - started
    backend = own.backend
    assert isinstance(backend, GpuBackend)
    cached = min(CONTEXT, manifest.limits.max_seq_len // 2)
    widths = [width for width in STEP_WIDTHS if width <= (manifest.limits.max_tree_nodes or STEP_WIDTHS[-1])]
    context = of_length(prompts, cached)
    own.steps(widths, context, cached + max(widths), 4)  # warm up: captures CUDA graphs and compiles kernels
    steps = own.steps(widths, context, cached + max(widths), REPEATS)
    decoded = {mode: _decoded(own, backend, mode, prompts, max_new_tokens) for mode in MODES}
    answers = {mode: found.pop("answers") for mode, found in decoded.items()}
    return {
        "backend": place.backend,
        "precision": manifest.precision,
        "cuda_graphs": cuda_graphs,
        "open_seconds": round(opened, 2),
        "prompts": len(prompts),
        "cached_tokens": cached,
        "step_ms": {width: round(1e3 * seconds, 4) for width, seconds in steps["step_seconds"].items()},
        "heads_ms": round(1e3 * steps["head_seconds"]["1"], 4),
        "decoding": decoded,
        "medusa_over_plain": {mode: ratio(answers[mode], answers["plain"]) for mode in MODES[1:]},
        "agreement_with_plain": {mode: agreement(answers[mode], answers["plain"]) for mode in MODES[1:]},
        "memory_bytes": backend.memory(),
    }


def _decoded(
    own: OwnDecoding, backend: GpuBackend, mode: str, prompts: list[BenchPrompt], max_new_tokens: int
) -> dict[str, Any]:
    """Decode all prompts in one mode. The host's share includes the steps that read prompts."""
    own.generate(mode, prompts[0].token_ids, min(WARM_UP, max_new_tokens))
    waits, down = Waits(backend), backend.num_bytes_down
    answers = [
        Answer.of(mode, place, 0, own.generate(mode, prompt.token_ids, max_new_tokens)) for place, prompt in enumerate(prompts)
    ]
    backend.gpu.synchronize = waits._wait  # type: ignore[method-assign]
    wall, steps = sum(one.seconds[-1] for one in answers), sum(len(one.sizes) for one in answers)
    return summarize(answers) | {
        "host_percent": round(100 * (1 - waits.seconds / wall), 2),
        "bytes_down_per_step": round((backend.num_bytes_down - down) / steps),
        "answers": answers,
    }


def in_pytorch(
    checkpoint: Path, heads: Path, manifest: Manifest, prompts: list[BenchPrompt], max_new_tokens: int, *, compiled: bool
) -> dict[str, Any]:
    """Measure the same heads and tree in PyTorch on the GPU, in a new process."""
    settings = {
        "checkpoint": str(checkpoint.resolve()),
        "heads": str(heads.resolve()),
        "tree": manifest.tree,
        "dtype": TORCH_DTYPES[manifest.precision],
        "threads": 4,
        "device": "cuda",
        "compile": compiled,
    }
    name = f"torch-medusa {'compiled' if compiled else 'eager'}"
    try:
        with WorkerProcess(name, [sys.executable, str(REQUEST_LOOP), "with_torch_medusa", json.dumps(settings)]) as worker:
            for prompt in prompts[:2]:  # warm up: it compiles
                worker.ask("generate", token_ids=prompt.token_ids, max_new_tokens=max_new_tokens)
            answers = [
                Answer.of(name, place, 0, worker.ask("generate", token_ids=prompt.token_ids, max_new_tokens=max_new_tokens))
                for place, prompt in enumerate(prompts)
            ]
    except WorkerError as error:
        return {"failed": str(error)}
    return {"precision": manifest.precision, **summarize(answers)}


def beside(arguments: list[str]) -> dict[str, Any]:
    """Run `measured` in a new process, so that its memory is separate and a crash does not end this one."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--alone"], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    lines = (done.stderr or done.stdout).strip().splitlines()
    if done.returncode:
        return {"failed": lines[-1] if lines else f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--prompts", type=click.Path(path_type=Path), help="JSON lines, or text with one prompt per line.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only this many of the prompts.")
@click.option("--max-new-tokens", type=click.IntRange(min=8), default=128, show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="For the comparison with PyTorch.")
@click.option("--heads", type=click.Path(path_type=Path, exists=True), help="For the comparison with PyTorch.")
@click.option("--alone", is_flag=True, hidden=True, help="Measure one bundle in this process, and print the result.")
@click.option("--cuda-graphs/--no-cuda-graphs", default=True, hidden=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    bundles: tuple[Path, ...],
    *,
    prompts: Path | None,
    limit: int | None,
    max_new_tokens: int,
    checkpoint: Path | None,
    heads: Path | None,
    alone: bool,
    cuda_graphs: bool,
    output: Path | None,
) -> None:
    """Measure BUNDLES on the GPU."""
    try:
        asked = load_prompts(prompts, limit, TextCodec(bundles[0]))
        if alone:
            click.echo(json.dumps(measured(bundles[0], asked, max_new_tokens, cuda_graphs=cuda_graphs)))
            return
        manifests = {path.name: Manifest.load(path) for path in bundles}
    except MedusaError as error:
        raise click.ClickException(str(error)) from error
    if (why := find_gpus().why_none) is not None:
        raise click.ClickException(f"there is no GPU to measure on: {why}")
    words = ["--max-new-tokens", str(max_new_tokens)]
    words += ["--prompts", str(prompts)] if prompts else []
    words += ["--limit", str(limit)] if limit else []
    flags = ("--cuda-graphs", "--no-cuda-graphs")
    runs = {path.name: {flag[2:]: beside([str(path), *words, flag]) for flag in flags} for path in bundles}
    pytorch = {
        f"{precision} {'compiled' if compiled else 'eager'}": in_pytorch(
            checkpoint, heads, manifest, asked, max_new_tokens, compiled=compiled
        )
        for precision, manifest in {manifest.precision: manifest for manifest in manifests.values()}.items()
        for compiled in (False, True)
        if checkpoint and heads
    }
    publish(environment() | {"prompts": len(asked), "max_new_tokens": max_new_tokens, "runs": runs, "pytorch": pytorch}, output)
    # some bundles cannot be captured as CUDA graphs
    sys.exit(1 if any(all("failed" in run for run in ways.values()) for ways in runs.values()) else 0)


if __name__ == "__main__":
    main()
