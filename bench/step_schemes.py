"""Measures a step of several bundles by its tokens, such as the schemes of one model, in turn in one process.

python bench/step_schemes.py BUNDLE... [-o bench/results/step_schemes.json]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish
from step_cost import step

from medusa_runtime import Manifest
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.choosing import open_backend

TOKENS = (1, 2, 4, 8, 16, 32, 64)
CACHED = 256


def milliseconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--repeats", default=31, show_default=True, help="Steps of each bundle and size.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundles: tuple[Path, ...], repeats: int, output: Path | None) -> None:
    """Measure a step of BUNDLES on the CPU."""
    sides: dict[str, Backend] = {}
    facts: dict[str, dict[str, object]] = {}
    for bundle in bundles:
        manifest = Manifest.load(bundle)
        sides[bundle.name] = open_backend(bundle, manifest, "ort-cpu")
        sides[bundle.name].resize(1, 512)
        quantization = manifest.quantization
        facts[bundle.name] = {
            "megabytes": round(sum(file.size for file in manifest.files.values()) / 1e6),
            "scheme": quantization.scheme if quantization else manifest.precision,
            "activation_bits": quantization.activation_bits if quantization else None,
            "mean_kl": quantization.quality.get("mean_kl") if quantization else 0.0,
        }
    times: dict[str, dict[int, list[float]]] = {name: {tokens: [] for tokens in TOKENS} for name in sides}
    for round_ in range(repeats + 1):
        for tokens in TOKENS:
            for name, backend in sides.items():
                run = step(backend, tokens, CACHED)
                run()  # of this bundle, so that its weights are where they are while it decodes
                spent = milliseconds(run)
                if round_:
                    times[name][tokens].append(spent)
    result = environment() | {
        "unit": "ms, medians, in turn",
        "cached": CACHED,
        "bundles": {
            name: facts[name] | {"step_by_tokens": {tokens: round(float(np.median(found)), 2) for tokens, found in by.items()}}
            for name, by in times.items()
        },
    }
    publish(result, output)


if __name__ == "__main__":
    main()
