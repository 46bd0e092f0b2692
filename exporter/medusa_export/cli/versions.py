"""`medusa-export --version`: our version, and those of the packages that results depend on, none of which is imported."""

from __future__ import annotations

import importlib.metadata
import platform

OURS = "medusa-export"
PACKAGES = (
    "numpy", "tokenizers", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-webgpu", "tensorrt-cu13", "tensorrt-rtx-cu13",
    "cuda-bindings", "llguidance", "onnx", "onnx-ir", "onnxscript", "torch", "transformers", "optimum", "safetensors",
    "accelerate",
)  # fmt: skip


def version_of(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions of this program, of Python, and of those packages that are installed."""
    found = {package: version for package in PACKAGES if (version := version_of(package)) is not None}
    python = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    return {OURS: version_of(OURS) or "not installed: it runs from its source", "python": python, **found}
