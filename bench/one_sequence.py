"""Measures the speed-up of the graph for one sequence over the graph for any number, by step width and cached entries.

    python bench/one_sequence.py BUNDLE … [-o bench/results/one_sequence.json]

Both graphs of a bundle run in turn, step by step, on caches with equal contents.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_runtime import Backend, Manifest
from medusa_runtime.backends.choosing import open_backend
from medusa_runtime.bundle.manifest import ORT_CPU, ORT_CPU_SINGLE, STEP

WIDTHS, CACHED, PREFILLED, REPEATS = (1, 4, 8, 16, 64), (256, 1024, 4096), (128, 512), 25
CHUNK = 256  # tokens per step while the cache is filled


def opened(bundle: Path, target: str) -> Backend:
    manifest = Manifest.load(bundle)
    if target != ORT_CPU_SINGLE:
        del manifest.graphs[f"{STEP}.{ORT_CPU_SINGLE}"]
    backend = open_backend(bundle, manifest, ORT_CPU)
    backend.resize(1, max(CACHED) + max(WIDTHS))
    return backend


def step(backend: Backend, tokens: int, cached: int, rows: int) -> float:
    """Run a step of arbitrary tokens with its last rows evaluated. Returns milliseconds."""
    ids = np.arange(cached, cached + tokens)[None] % 1000 + 100
    started = time.perf_counter()
    backend.step(
        ids,
        np.arange(cached, cached + tokens)[None],
        np.tri(tokens, dtype=np.bool_)[None],
        np.array([cached]),
        np.arange(tokens - rows, tokens)[None],
    )
    return 1e3 * (time.perf_counter() - started)


def compare(backends: dict[str, Backend], tokens: int, cached: int, rows: int, repeats: int) -> dict[str, float]:
    """Medians of both times, and the median of their ratios."""
    times = np.array([[step(backend, tokens, cached, rows) for backend in backends.values()] for _ in range(repeats + 2)])[2:]
    medians = dict(zip(backends, np.median(times, axis=0).round(3).tolist(), strict=True))
    return medians | {"ratio": round(float(np.median(times[:, 0] / times[:, 1])), 3)}


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundles: tuple[Path, ...], output: Path | None) -> None:
    """Measure steps of BUNDLES with both graphs."""
    result = environment() | {"unit": "ms, medians; ratio: any number over one", "bundles": {}}
    for bundle in bundles:
        backends = {"any number": opened(bundle, ORT_CPU), "one": opened(bundle, ORT_CPU_SINGLE)}
        steps: dict[str, dict[str, dict[str, float]]] = {}
        prefill = {str(tokens): compare(backends, tokens, 0, 1, 5) for tokens in PREFILLED}
        filled = 0
        for cached in CACHED:
            for start in range(filled, cached, CHUNK):
                for backend in backends.values():
                    step(backend, min(CHUNK, cached - start), start, 1)
            filled = cached
            steps[str(cached)] = {str(tokens): compare(backends, tokens, cached, tokens, REPEATS) for tokens in WIDTHS}
        result["bundles"][bundle.name] = {"step_by_cached_and_tokens": steps, "prompt_by_tokens": prefill}
        del backends
    publish(result, output)


if __name__ == "__main__":
    main()
