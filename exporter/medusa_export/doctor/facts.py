"""What is here: Python, packages, GPUs. Nothing heavy is imported to find out."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass, field

from medusa_export.trt.flavor import FLAVORS, TensorRT
from medusa_runtime.cuda.devices import Gpus, find_gpus
from medusa_runtime.errors import MedusaError, first_line

PACKAGES = (
    "medusa-export", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13",
    "cuda-bindings", "onnx", "onnx-ir", "torch", "transformers",
)  # fmt: skip


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


def find_facts() -> Facts:
    """Look around. Imports ONNX Runtime and TensorRT where they are installed, and neither PyTorch nor Transformers."""
    gpus = find_gpus()
    missing = {name: why for name in ("onnxruntime", "cuda.bindings.driver") if (why := import_problem(name))}
    for name in ("onnx", "onnx_ir", "onnxscript", "torch", "transformers", "optimum", "safetensors", "accelerate"):
        if importlib.util.find_spec(name) is None:
            missing[name] = f"{name} is not installed"
    return Facts(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        missing=missing,
        providers=[] if "onnxruntime" in missing else _providers(),
        gpus=gpus,
        flavors={flavor: _flavor(flavor) for flavor in FLAVORS},
    )


def import_problem(module: str) -> str | None:
    """Why a module cannot be imported, in a line; none where it can be."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - whatever a package says when its libraries are not there
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            return f"{module} is not installed"
        return f"{module} does not load: {first_line(error)}"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    return list(importlib.import_module("onnxruntime").get_available_providers())


def _flavor(flavor: str) -> FlavorFacts:
    module = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}[flavor]
    if (why := import_problem(module)) is not None:
        return FlavorFacts(why_not=why)
    tensorrt = TensorRT.load(flavor)
    try:
        return FlavorFacts(tensorrt.version, tensorrt.known_compute_capabilities())
    except MedusaError:  # full TensorRT builds for the GPU here, and there is none
        return FlavorFacts(tensorrt.version)
