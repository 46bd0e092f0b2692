"""The part of every benchmark result that describes the machine and the run."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from medusa_export.measure.bench.machine import machine
from medusa_export.provenance import FOLDERS
from medusa_runtime.bundle.files import json_text, write_whole

PACKAGES = (
    "medusa-export", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "numpy", "onnxscript", "tensorrt-cu13",
    "tensorrt-rtx-cu13", "cuda-bindings",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """The command, the versions and the machine."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": ["python", *(FOLDERS.sub("", word) for word in sys.argv)],
        "versions": versions,
        "machine": machine(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def publish(result: dict[str, Any], output: Path | None) -> None:
    """Print a result as JSON, and write it to a file if one is given."""
    text = json_text(result, indent=2)
    click.echo(text)
    if output:
        write_whole(output, text + "\n")
