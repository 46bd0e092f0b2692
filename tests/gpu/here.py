"""The GPU and the packages of this machine for the tests of this folder, or the reasons why they cannot run."""

from __future__ import annotations

import pytest

from medusa_export.doctor.machine_facts import find_facts
from medusa_export.doctor.verdicts import verdicts
from medusa_runtime.backends.gpu.devices import find_gpus

GPUS = find_gpus()
BACKENDS = ("ort-cuda", "trt", "trt-rtx")
FLAVORS = {"trt": "tensorrt", "trt-rtx": "rtx"}  # of engines, by backend
PRECISIONS = ("fp32", "fp16", "bf16")


def _reasons() -> dict[str, str | None]:
    """For each backend the reason why it cannot run on this machine, or None."""
    if GPUS.why_none is not None:
        return dict.fromkeys(BACKENDS, GPUS.why_none)
    found = {(verdict.action, verdict.what): verdict for verdict in verdicts(find_facts())}
    reasons: dict[str, str | None] = {}
    for backend in BACKENDS:
        needed = [found["run", backend]]
        if backend in FLAVORS:  # the tests build their engines
            needed.append(found["build", "rtx" if backend == "trt-rtx" else "trt"])
        reasons[backend] = next((f"{backend}: {one.why}" for one in needed if not one.works), None)
    return reasons


WHY_NOT = _reasons()
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(WHY_NOT[name] is not None, reason=str(WHY_NOT[name]))) for name in BACKENDS
]
ENGINES = [parameter for parameter in NAMES if parameter.values[0] in FLAVORS]
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(GPUS.why_none is not None, reason=f"no GPU: {GPUS.why_none}")]
on_each_backend = pytest.mark.parametrize("backend", NAMES)
on_each_engine = pytest.mark.parametrize("backend", ENGINES)
in_each_precision = pytest.mark.parametrize("precision", PRECISIONS)
