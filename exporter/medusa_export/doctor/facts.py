"""What is here: Python, packages, GPUs. Nothing heavy is imported to find out."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from medusa_export.packages import import_problem
from medusa_export.trt.flavor import FLAVORS, TensorRT, module_of
from medusa_runtime.backends.gpu.devices import Gpus, find_gpus
from medusa_runtime.errors import MedusaError, first_line

PACKAGES = (
    "medusa-export", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13",
    "cuda-bindings", "onnx", "onnx-ir", "torch", "transformers",
)  # fmt: skip
CUDA_PROVIDER = "CUDAExecutionProvider"
CUDA_LIBRARY = "capi/libonnxruntime_providers_cuda.so"  # that provider's, within the module `onnxruntime`


@dataclass(frozen=True)
class FlavorFacts:
    """A flavour of TensorRT."""

    version: str | None = None
    compute_capabilities: list[str] = field(default_factory=list)  # that it builds for here
    why_not: str | None = None  # it cannot be used at all


@dataclass(frozen=True)
class Facts:
    """This Python on this machine."""

    python: str
    system: str
    packages: dict[str, str | None]  # versions, by the name that pip knows; none where it is not installed
    missing: dict[str, str]  # modules that cannot be imported, with the reason in a line
    providers: list[str]  # of ONNX Runtime
    gpus: Gpus
    flavors: dict[str, FlavorFacts]
    why_no_cuda: str | None = None  # ONNX Runtime's CUDA provider does not load; not asked where there is no GPU for it


def find_facts() -> Facts:
    """Look around. Imports ONNX Runtime and TensorRT where they are installed, and neither PyTorch nor Transformers."""
    gpus, providers = find_gpus(), _providers()
    missing = {name: why for name in ("onnxruntime", "cuda.bindings.driver") if (why := import_problem(name))}
    for name in ("onnx", "onnx_ir", "onnxscript", "torch", "transformers", "optimum", "safetensors", "accelerate"):
        if importlib.util.find_spec(name) is None:
            missing[name] = f"{name} is not installed"
    return Facts(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        missing=missing,
        providers=providers,
        gpus=gpus,
        flavors={flavor: _flavor(flavor) for flavor in FLAVORS},
        why_no_cuda=_why_no_cuda() if gpus.gpus and CUDA_PROVIDER in providers else None,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    """What this ONNX Runtime was built with; none where there is none."""
    return [] if import_problem("onnxruntime") else list(importlib.import_module("onnxruntime").get_available_providers())


def _why_no_cuda() -> str | None:
    """What keeps the CUDA provider's library, and with it CUDA's, from being loaded; a session would say less."""
    onnxruntime = importlib.import_module("onnxruntime")
    try:
        with redirect_stdout(sys.stderr):  # on which it says what it does not find
            onnxruntime.preload_dlls()
        ctypes.CDLL(str(Path(str(onnxruntime.__file__)).parent / CUDA_LIBRARY))
    except Exception as error:  # noqa: BLE001 - whatever keeps a library from being loaded
        return first_line(error)
    return None


def _flavor(flavor: str) -> FlavorFacts:
    if (why := import_problem(module_of(flavor))) is not None:
        return FlavorFacts(why_not=why)
    tensorrt = TensorRT.load(flavor)
    try:
        return FlavorFacts(tensorrt.version, tensorrt.known_compute_capabilities())
    except MedusaError:  # full TensorRT builds for the GPU here, and there is none
        return FlavorFacts(tensorrt.version)
