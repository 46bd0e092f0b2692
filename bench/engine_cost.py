"""Measures building TensorRT-RTX engines: seconds and peak memory of a fresh process, and sizes of the plans.

    python bench/engine_cost.py BUNDLE [BUNDLE …] [-o bench/results/engine_cost.json]

It needs no GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_runtime import Manifest

PROGRAM = """
import json, resource, sys, time
started = time.perf_counter()
from pathlib import Path
from medusa_export.engine.build import build_engines
from medusa_export.command_options.engine_options import EngineOptions
manifest = build_engines(EngineOptions(Path(sys.argv[1]), Path(sys.argv[2])))
print(json.dumps({
    "precision": manifest.precision,
    "compute_capabilities": manifest.engine.compute_capabilities,
    "limits": manifest.limits.model_dump(),
    "seconds": round(time.perf_counter() - started, 1),
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "plan_bytes": {name: facts.size for name, facts in manifest.files.items() if name.endswith(".plan")},
}))
"""


def build(bundle: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", PROGRAM, str(bundle), f"{scratch}/engine"]
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    weights = Manifest.load(bundle).files["weights.bin"].size
    return found | {"peak_over_weights": round(found["peak_bytes"] / weights, 2)}


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundles: tuple[Path, ...], output: Path | None) -> None:
    """Build engines from each BUNDLE with the default limits."""
    publish(environment() | {"builds": [build(bundle) for bundle in bundles]}, output)


if __name__ == "__main__":
    main()
