"""The facts of this machine: Python, packages and GPUs, found without importing PyTorch or Transformers."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass, field
from pathlib import Path

from medusa_export.engine.flavor import FLAVORS, TensorRT, module_of
from medusa_export.packages import import_problem
from medusa_runtime.backends.gpu.devices import Gpus, find_gpus, preload_libraries
from medusa_runtime.backends.webgpu.adapters import Adapter, find_adapters
from medusa_runtime.backends.webgpu.vulkan import VulkanDevice, find_vulkan_devices
from medusa_runtime.errors import MedusaError, first_line

PACKAGES = (
    "medusa-export", "numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-webgpu", "tensorrt", "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "cuda-bindings", "onnx", "onnx-ir", "torch", "transformers",
)  # fmt: skip
CUDA_PROVIDER = "CUDAExecutionProvider"
CUDA_LIBRARY = "capi/libonnxruntime_providers_cuda.so"  # of the CUDA provider, in the package `onnxruntime`


@dataclass(frozen=True)
class FlavorFacts:
    """A flavour of TensorRT."""

    version: str | None = None
    compute_capabilities: list[str] = field(default_factory=list)  # the ones it can build for on this machine
    why_not: str | None = None  # the reason why it cannot be used at all


@dataclass(frozen=True)
class Facts:
    """This Python on this machine."""

    python: str
    system: str
    packages: dict[str, str | None]  # pip's name → version, None if it is not installed
    missing: dict[str, str]  # module that cannot be imported → reason in one line
    providers: list[str]  # of ONNX Runtime
    gpus: Gpus
    flavors: dict[str, FlavorFacts]
    adapters: list[Adapter] = field(default_factory=list)  # what WebGPU finds
    vulkan: list[VulkanDevice] = field(default_factory=list)  # what Vulkan's driver tells of them
    why_no_webgpu: str | None = None  # why its provider cannot be used
    why_no_cuda: str | None = None  # why ONNX Runtime's CUDA provider does not load; only checked if there is a GPU


def find_facts() -> Facts:
    """Collect the facts. Imports ONNX Runtime and TensorRT if they are installed, but neither PyTorch nor Transformers."""
    gpus, providers = find_gpus(), _providers()
    missing = {name: why for name in ("onnxruntime", "cuda.bindings.driver") if (why := import_problem(name))}
    for name in ("onnx", "onnx_ir", "onnxscript", "torch", "transformers", "optimum", "safetensors", "accelerate"):
        if importlib.util.find_spec(name) is None:
            missing[name] = f"{name} is not installed"
    adapters, why_no_webgpu = _adapters()
    return Facts(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        missing=missing,
        providers=providers,
        gpus=gpus,
        flavors={flavor: _flavor(flavor) for flavor in FLAVORS},
        adapters=adapters,
        vulkan=find_vulkan_devices() if adapters else [],
        why_no_webgpu=why_no_webgpu,
        why_no_cuda=_why_no_cuda() if gpus.gpus and CUDA_PROVIDER in providers else None,
    )


def _adapters() -> tuple[list[Adapter], str | None]:
    """What WebGPU finds, or why its provider cannot be used."""
    try:
        return find_adapters(), None
    except MedusaError as error:
        return [], first_line(error).partition(";")[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    """The execution providers of ONNX Runtime; empty if it is not installed."""
    return [] if import_problem("onnxruntime") else list(importlib.import_module("onnxruntime").get_available_providers())


def _why_no_cuda() -> str | None:
    """The reason why the library of the CUDA provider does not load. A session's error would say less."""
    onnxruntime = importlib.import_module("onnxruntime")
    try:
        preload_libraries(onnxruntime)
        ctypes.CDLL(str(Path(str(onnxruntime.__file__)).parent / CUDA_LIBRARY))
    except Exception as error:  # noqa: BLE001 - loading a library can raise anything
        return first_line(error)
    return None


def _flavor(flavor: str) -> FlavorFacts:
    if (why := import_problem(module_of(flavor))) is not None:
        return FlavorFacts(why_not=why)
    tensorrt = TensorRT.load(flavor)
    try:
        return FlavorFacts(tensorrt.version, tensorrt.known_compute_capabilities())
    except MedusaError:  # full TensorRT builds for this machine's GPU, and there is none
        return FlavorFacts(tensorrt.version)
