"""A machine whose GPU, TensorRT and ONNX Runtime with CUDA are stand-ins: so that tests/gpu can be tested where there is none.

    pytest -p tests.support.stand_in_machine tests/gpu -k "not bf16 and not real"

It is a plugin, because tests/gpu looks around when it is collected. Engines are the graphs that TensorRT would be given. What
cannot pass: bfloat16, which ONNX Runtime has no CPU kernels for, and the speed of the real model.
"""

from __future__ import annotations

import importlib
import sys

import medusa_export.engine.build
from medusa_export.command_options.engine_options import EngineOptions
from medusa_export.doctor import machine_facts as facts
from medusa_export.doctor import verdicts
from medusa_runtime.backends.gpu import ort_cuda
from medusa_runtime.bundle.manifest import Manifest
from tests.support.engines import stand_in_engine
from tests.support.stand_in_cuda import StandInDriver
from tests.support.stand_in_ort_cuda import StandInOrt
from tests.support.stand_in_tensorrt import VERSION, StandInTensorRT

CAPABILITY = "8.9"
ALL_WORK = [("run", "ort-cuda"), ("run", "trt"), ("run", "trt-rtx"), ("build", "trt"), ("build", "rtx")]


def build_engines(options: EngineOptions) -> Manifest:
    """In place of `medusa_export.engine.build.build_engines`."""
    stand_in_engine(
        options.bundle,
        options.output,
        options.flavor,
        max_batch_size=options.max_batch_size,
        max_tree_nodes=options.max_tree_nodes,
        max_prefill_tokens=options.max_prefill_tokens,
    )
    return Manifest.load(options.output)


for module in ("optimum.exporters.tasks", "medusa_export.check"):  # which look for the real modules as they are imported
    importlib.import_module(module)
driver = StandInDriver(CAPABILITY)
sys.modules["cuda.bindings.driver"] = driver  # type: ignore[assignment] # modules, as far as they are asked
sys.modules["tensorrt"] = sys.modules["tensorrt_rtx"] = StandInTensorRT(driver)  # type: ignore[assignment]
ort_cuda.ort = StandInOrt(driver)
facts._flavor = lambda _: facts.FlavorFacts(VERSION, [CAPABILITY])
verdicts.verdicts = lambda _: [verdicts.Verdict(action, what, works=True, why="a stand-in") for action, what in ALL_WORK]
medusa_export.engine.build.build_engines = build_engines
