"""Measures whether RMSNormalization and RotaryEmbedding are faster as single operators than as the nodes of a trace.

    python bench/fused_operators.py MODEL HEADS [-o bench/results/fused_operators.json]

The four graphs run in turn in one process. Together their weights are larger than the processor's cache; those of a single
model might not be.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_export.bundle.export import export_bundle
from medusa_export.command_options.export_options import ExportOptions
from medusa_runtime import Backend, Manifest
from medusa_runtime.backends.choosing import open_backend

VARIANTS = {"both": (), "norm only": ("FuseRotary",), "rotary only": ("fuse_rms_normalization",)}
VARIANTS["neither"] = ("FuseRotary", "fuse_rms_normalization")
REPEATS, CACHED = 25, 128


def export_variant(model: str, heads: Path, output: Path, left_out: tuple[str, ...]) -> Backend:
    """Export without some of the fusions."""
    with ExitStack() as patches:
        for name in left_out:
            patches.enter_context(mock.patch(f"medusa_export.trace.step_graph.{name}"))
        manifest = export_bundle(ExportOptions(model, heads, output))
    backend = open_backend(output, Manifest.load(output))
    backend.resize(1, 256)
    assert manifest.precision == "fp32"
    return backend


def step(backend: Backend, tokens: int) -> float:
    started = time.perf_counter()
    backend.step(
        np.ones((1, tokens), np.int64),
        np.arange(CACHED, CACHED + tokens)[None],
        np.tri(tokens, dtype=np.bool_)[None],
        np.array([CACHED]),
        np.arange(tokens)[None],
    )
    return 1e3 * (time.perf_counter() - started)


@click.command()
@click.argument("model")
@click.argument("heads", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(model: str, heads: Path, output: Path | None) -> None:
    """Export MODEL with HEADS four ways and time a step of each."""
    result = environment() | {
        "unit": "ms, median",
        "heads": json.loads((heads / "config.json").read_text(encoding="utf-8")),
        "step_by_tokens": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        backends = {
            name: export_variant(model, heads, Path(scratch) / name.replace(" ", "_"), left_out)
            for name, left_out in VARIANTS.items()
        }
        for tokens in (1, 16, 64):
            times = [[step(backend, tokens) for backend in backends.values()] for _ in range(REPEATS)]
            result["step_by_tokens"][tokens] = dict(zip(VARIANTS, np.median(times[3:], axis=0).round(2).tolist(), strict=True))
    publish(result, output)


if __name__ == "__main__":
    main()
