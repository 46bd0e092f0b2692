"""What every benchmark result says of the machine and the run that made it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

PACKAGES = ("medusa-export", "onnxruntime", "torch", "transformers", "numpy", "onnxscript", "tensorrt-rtx-cu13")


def environment() -> dict[str, Any]:
    """The command, the versions and the machine."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": ["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)],
        "versions": versions,
        "machine": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "system": platform.system()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def publish(result: dict[str, Any], output: Path | None) -> None:
    """Print a result as JSON, and keep it where that is asked for."""
    text = json.dumps(result, indent=2)
    click.echo(text)
    if output:
        output.write_text(text + "\n")


def _cpu() -> str:
    flags = {"amx_int8", "avx512f", "avx2"}
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    return f"{facts.get('model name', platform.machine())} ({', '.join(sorted(flags & set(facts.get('flags', '').split())))})"
