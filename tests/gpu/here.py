"""The GPU and the packages of this machine for the tests of this folder, or the reasons why they cannot run."""

from __future__ import annotations

import pytest

from medusa_export.doctor.machine_facts import find_facts
from medusa_export.doctor.verdicts import verdicts
from medusa_runtime.backends.gpu.devices import find_gpus
from medusa_runtime.backends.webgpu.adapters import find_adapters
from tests.support.software_gpu import why_no_webgpu

GPUS = find_gpus()
WEBGPU = "ort-webgpu"  # runs on any GPU, or on a driver in software
BACKENDS = ("ort-cuda", "trt", "trt-rtx", WEBGPU)
FLAVORS = {"trt": "tensorrt", "trt-rtx": "rtx"}  # of engines, by backend
PRECISIONS = ("fp32", "fp16", "bf16")


def _reasons() -> dict[str, str | None]:
    """For each backend the reason why it cannot run on this machine, or None."""
    webgpu = {WEBGPU: why_no_webgpu()}
    if GPUS.why_none is not None:
        return dict.fromkeys(BACKENDS, f"no GPU: {GPUS.why_none}") | webgpu
    found = {(verdict.action, verdict.what): verdict for verdict in verdicts(find_facts())}
    reasons: dict[str, str | None] = {}
    for backend in BACKENDS[:-1]:
        needed = [found["run", backend]]
        if backend in FLAVORS:  # the tests build their engines
            needed.append(found["build", "rtx" if backend == "trt-rtx" else "trt"])
        reasons[backend] = next((f"{backend}: {one.why}" for one in needed if not one.works), None)
    return reasons | webgpu


def device_of(backend: str) -> str:
    """The name of the device that a backend runs on."""
    return "gpu" if backend == WEBGPU else "cuda"


WHY_NOT = _reasons()
IN_SOFTWARE = WHY_NOT[WEBGPU] is None and all(adapter.is_software for adapter in find_adapters())
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(WHY_NOT[name] is not None, reason=str(WHY_NOT[name]))) for name in BACKENDS
]
WITH_CUDA = [parameter for parameter in NAMES if parameter.values[0] != WEBGPU]
ENGINES = [parameter for parameter in NAMES if parameter.values[0] in FLAVORS]
a_gpus = pytest.mark.gpu  # the tests of this folder
needs_cuda = pytest.mark.skipif(GPUS.why_none is not None, reason=f"no GPU: {GPUS.why_none}")
on_each_backend = pytest.mark.parametrize("backend", NAMES)
on_each_with_cuda = pytest.mark.parametrize("backend", WITH_CUDA)
on_each_engine = pytest.mark.parametrize("backend", ENGINES)
in_each_precision = pytest.mark.parametrize("precision", PRECISIONS)
