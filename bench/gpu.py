"""Measures bundles on a GPU: steps by width, decoding with and without Medusa, the host's share, downloads, and memory.

    python bench/gpu.py BUNDLE... [--checkpoint DIR --heads DIR] [--prompts FILE] [-o bench/results/gpu.json]
    python bench/gpu.py BUNDLE... --device gpu

On an NVIDIA GPU (`--device cuda`), each bundle runs with ONNX Runtime or with the TensorRT that built its engines, with and
without CUDA graphs, each time in a new process. If a checkpoint and its heads are given, the same decoding is measured in
PyTorch, eager and compiled. The output file is written after each of them.

`--device gpu` is any GPU, through WebGPU. It has no CUDA graphs, and its backend counts neither waits nor bytes, so the host's
share, downloads and memory are missing there. On a driver in software, whose times say nothing of a GPU, no time is reported:
only tokens a step, and whether the tokens are those of plain decoding.
"""

from __future__ import annotations

import itertools
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
from medusa_runtime import BackendError, Manifest, MedusaError, choose_backend
from medusa_runtime.backends.gpu.backend import GpuBackend
from medusa_runtime.backends.gpu.devices import find_gpus
from medusa_runtime.backends.webgpu.adapters import choose_adapter
from medusa_runtime.bundle.files import json_text, write_whole
from medusa_runtime.text.codec import TextCodec

MEASURES = ("bundles", "eager", "compiled")  # the last two in PyTorch
WAYS: dict[str, dict[str, list[str]]] = {  # to run a bundle on a device -> the options of its process
    "cuda": {"cuda-graphs": ["--cuda-graphs"], "no-cuda-graphs": ["--no-cuda-graphs"]},
    "gpu": {"webgpu": []},
}
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


def measured(
    bundle: Path, prompts: list[BenchPrompt], max_new_tokens: int, *, device: str = "cuda", cuda_graphs: bool | None
) -> dict[str, Any]:
    """Measure one bundle in this process."""
    manifest = Manifest.load(bundle)
    place = choose_backend(manifest, device=device)
    in_software = device == "gpu" and choose_adapter(0).is_software
    prompts = [one for one in prompts if len(one.token_ids) + max_new_tokens <= manifest.limits.max_seq_len]
    started = time.perf_counter()
    own = OwnDecoding(str(bundle), 0, place.backend, place.device, cuda_graphs=cuda_graphs)
    opened = time.perf_counter() - started
    decoded = {mode: _decoded(own, mode, prompts, max_new_tokens) for mode in MODES}
    answers = {mode: found.pop("answers") for mode, found in decoded.items()}
    same = {"agreement_with_plain": {mode: agreement(answers[mode], answers["plain"]) for mode in MODES[1:]}}
    facts: dict[str, Any] = {"backend": place.backend, "precision": manifest.precision, "prompts": len(prompts)}
    if in_software:
        steps = {mode: {name: found[name] for name in ("num_answers", "tokens_per_step")} for mode, found in decoded.items()}
        return facts | {"is_software": True, "decoding": steps} | same
    memory = {"memory_bytes": own.backend.memory()} if isinstance(own.backend, GpuBackend) else {}
    return (
        facts
        | {"cuda_graphs": cuda_graphs, "open_seconds": round(opened, 2)}
        | _steps(own, manifest, prompts)
        | {"decoding": decoded, "medusa_over_plain": {mode: ratio(answers[mode], answers["plain"]) for mode in MODES[1:]}}
        | same
        | memory
    )


def _steps(own: OwnDecoding, manifest: Manifest, prompts: list[BenchPrompt]) -> dict[str, Any]:
    """Milliseconds of steps by width, and of the heads."""
    cached = min(CONTEXT, manifest.limits.max_seq_len // 2)
    widths = [width for width in STEP_WIDTHS if width <= (manifest.limits.max_tree_nodes or STEP_WIDTHS[-1])]
    context = of_length(prompts, cached)
    own.steps(widths, context, cached + max(widths), 4)  # warm up: captures CUDA graphs and compiles kernels
    steps = own.steps(widths, context, cached + max(widths), REPEATS)
    return {
        "cached_tokens": cached,
        "step_ms": {width: round(1e3 * seconds, 4) for width, seconds in steps["step_seconds"].items()},
        "heads_ms": round(1e3 * steps["head_seconds"]["1"], 4),
    }


def _decoded(own: OwnDecoding, mode: str, prompts: list[BenchPrompt], max_new_tokens: int) -> dict[str, Any]:
    """Decode all prompts in one mode. The host's share includes the steps that read prompts."""
    own.generate(mode, prompts[0].token_ids, min(WARM_UP, max_new_tokens))
    backend = own.backend if isinstance(own.backend, GpuBackend) else None
    waits, down = (Waits(backend), backend.num_bytes_down) if backend else (None, 0)
    answers = [
        Answer.of(mode, place, 0, own.generate(mode, prompt.token_ids, max_new_tokens)) for place, prompt in enumerate(prompts)
    ]
    found = summarize(answers) | {"answers": answers}
    if backend is None or waits is None:
        return found
    backend.gpu.synchronize = waits._wait  # type: ignore[method-assign]
    wall, steps = sum(one.seconds[-1] for one in answers), sum(len(one.sizes) for one in answers)
    return found | {
        "host_percent": round(100 * (1 - waits.seconds / wall), 2),
        "bytes_down_per_step": round((backend.num_bytes_down - down) / steps),
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
@click.option("--device", type=click.Choice(["cuda", "gpu"]), default="cuda", show_default=True)
@click.option(
    "--measure", "measures", multiple=True, type=click.Choice(MEASURES), default=MEASURES, show_default=True, help="Only this."
)
@click.option("--alone", is_flag=True, hidden=True, help="Measure one bundle in this process, and print the result.")
@click.option("--cuda-graphs/--no-cuda-graphs", default=None, hidden=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    bundles: tuple[Path, ...],
    *,
    prompts: Path | None,
    limit: int | None,
    max_new_tokens: int,
    checkpoint: Path | None,
    heads: Path | None,
    device: str,
    measures: tuple[str, ...],
    alone: bool,
    cuda_graphs: bool | None,
    output: Path | None,
) -> None:
    """Measure BUNDLES on the GPU."""
    try:
        asked = load_prompts(prompts, limit, TextCodec(bundles[0]))
        if alone:
            click.echo(json.dumps(measured(bundles[0], asked, max_new_tokens, device=device, cuda_graphs=cuda_graphs)))
            return
        manifests = {path.name: Manifest.load(path) for path in bundles}
        require_gpu(device)
    except MedusaError as error:
        raise click.ClickException(str(error)) from error
    runs: dict[str, dict[str, Any]] = {}
    pytorch: dict[str, Any] = {}
    result = environment() | {"prompts": len(asked), "max_new_tokens": max_new_tokens, "runs": runs, "pytorch": pytorch}
    words = ["--max-new-tokens", str(max_new_tokens), "--device", device]
    words += ["--prompts", str(prompts)] if prompts else []
    words += ["--limit", str(limit)] if limit else []
    if "bundles" in measures:
        for path, (way, flags) in itertools.product(bundles, WAYS[device].items()):
            runs.setdefault(path.name, {})[way] = beside([str(path), *words, *flags])
            keep(result, output)
    if checkpoint and heads and device == "cuda":
        for manifest, how in itertools.product({one.precision: one for one in manifests.values()}.values(), MEASURES[1:]):
            if how in measures:
                found = in_pytorch(checkpoint, heads, manifest, asked, max_new_tokens, compiled=how == "compiled")
                pytorch[f"{manifest.precision} {how}"] = found
                keep(result, output)
    publish(result, output)
    # some bundles cannot be captured as CUDA graphs
    sys.exit(1 if any(all("failed" in run for run in ways.values()) for ways in runs.values()) else 0)


def require_gpu(device: str) -> None:
    """Refuse to measure where there is no GPU.

    Raises:
        MedusaError: there is none, with the reason.
    """
    if device == "gpu":
        choose_adapter(0)
    elif (why := find_gpus().why_none) is not None:
        raise BackendError(f"there is no GPU to measure on: {why}")


def keep(result: dict[str, Any], output: Path | None) -> None:
    """Write what was measured so far."""
    if output:
        write_whole(output, json_text(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
