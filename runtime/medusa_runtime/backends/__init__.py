"""Backends: where a bundle's graphs run."""

from __future__ import annotations

from pathlib import Path

from medusa_runtime.backends.base import Backend, HeadOutput, StepOutput
from medusa_runtime.errors import BackendError
from medusa_runtime.manifest import Manifest

BACKENDS = ("auto", "ort-cpu")

__all__ = ["BACKENDS", "Backend", "HeadOutput", "StepOutput", "open_backend"]


def open_backend(bundle: str | Path, manifest: Manifest, name: str = "auto", *, num_threads: int = 0) -> Backend:
    """Open a bundle on the backend of that name; `auto` takes the one there is for the bundle's kind.

    Raises:
        BackendError: the name is unknown, or no backend here runs this kind of bundle.
        MissingExtraError: the backend's package is not installed.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; there are: {', '.join(BACKENDS)}")
    if manifest.kind == "tensorrt":
        raise BackendError(f"{bundle} holds TensorRT engines, which this version builds but does not run yet")
    from medusa_runtime.backends.ort_cpu import OrtCpuBackend  # noqa: PLC0415 - needs an extra

    return OrtCpuBackend(bundle, manifest, num_threads)
