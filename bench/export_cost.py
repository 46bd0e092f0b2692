"""Measures an export of the real model: seconds of each part and peak memory of a fresh process.

python bench/export_cost.py MODEL HEADS [--runs 3] [-o bench/results/export_cost.json]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

PROGRAM = """
import json, resource, sys, time
started = time.perf_counter()
from pathlib import Path
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.bundle.export import export_bundle
imported = time.perf_counter()
export_bundle(ExportOptions(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), precision=sys.argv[4]))
done = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"import_seconds": imported - started, "export_seconds": done - imported, "peak_bytes": peak}))
"""


@click.command()
@click.argument("model")
@click.argument("heads")
@click.option("--precision", default="fp32", show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(model: str, heads: str, precision: str, runs: int, output: Path | None) -> None:
    """Export MODEL with HEADS several times, each time in a new process."""
    found = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as scratch:
            bundle = Path(scratch) / "bundle"
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, model, heads, str(bundle), precision],
                stdout=subprocess.PIPE,
                encoding="utf-8",
                check=True,
            )
            found.append(json.loads(done.stdout) | {"weights_bytes": (bundle / "weights.bin").stat().st_size})
    result = environment() | {
        "precision": precision,
        "heads": json.loads((Path(heads) / "config.json").read_text(encoding="utf-8")),
        "runs": found,
        "median_seconds": statistics.median(run["import_seconds"] + run["export_seconds"] for run in found),
        "median_peak_over_weights": statistics.median(run["peak_bytes"] / run["weights_bytes"] for run in found),
    }
    publish(result, output)


if __name__ == "__main__":
    main()
