"""The names of backends. They are apart from the backends, so that a command line can list them without loading NumPy."""

from __future__ import annotations

from medusa_runtime.bundle.manifest import ORT_CPU, ORT_CUDA, ORT_WEBGPU

AUTO, TRT, TRT_RTX = "auto", "trt", "trt-rtx"
BACKENDS = (AUTO, ORT_CPU, ORT_CUDA, ORT_WEBGPU, TRT, TRT_RTX)
