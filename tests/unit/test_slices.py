"""Every function, field and method that the stand-ins replace exists in the real packages."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from medusa_runtime.backends.gpu import driver, trt
from tests.support import stand_in_tensorrt
from tests.support.stand_in_cuda import StandInDriver

SOURCE = inspect.getsource(driver)


def test_functions_of_the_driver() -> None:
    real: Any = pytest.importorskip("cuda.bindings.driver")
    used = set(re.findall(r'"(cu[A-Z]\w+)"|\.(cu[A-Z]\w+)\(', SOURCE))
    names = {one or other for one, other in used}
    assert len(names) > 20
    assert not [name for name in names if not callable(getattr(real, name, None))]
    assert not [name for name in names if not hasattr(StandInDriver, f"_{name[2:].lower()}")]


def test_names_of_the_driver() -> None:
    real: Any = pytest.importorskip("cuda.bindings.driver")
    attributes = set(re.findall(r"CU_DEVICE_ATTRIBUTE_\w+", SOURCE))
    assert len(attributes) == 2
    assert attributes <= set(real.CUdevice_attribute.__members__)
    assert {"CUDA_SUCCESS", "CUDA_ERROR_OUT_OF_MEMORY"} <= set(real.CUresult.__members__)
    assert set(real.CUresult.__members__) >= driver.LASTING
    assert driver.THREAD_LOCAL in real.CUstreamCaptureMode.__members__
    assert "CU_MEMORYTYPE_DEVICE" in real.CUmemorytype.__members__


def test_a_copy_of_a_block_can_be_described() -> None:
    real: Any = pytest.importorskip("cuda.bindings.driver")
    order = real.CUDA_MEMCPY3D()
    fields = set(re.findall(r"order\.(\w+)", SOURCE))
    assert len(fields) == 11
    for name in fields:
        value = real.CUmemorytype.CU_MEMORYTYPE_DEVICE if name.endswith("MemoryType") else 256
        setattr(order, name, value)
        assert int(getattr(order, name)) == int(value)


@pytest.mark.parametrize(
    ("stand_in", "real"),
    [
        (stand_in_tensorrt.Engine, "ICudaEngine"),
        (stand_in_tensorrt.Context, "IExecutionContext"),
        (stand_in_tensorrt.RuntimeCache, "IRuntimeCache"),
    ],
)
def test_methods_of_tensorrt(stand_in: type, real: str) -> None:
    api = pytest.importorskip("tensorrt_rtx")
    own = {"graph_strategy"}  # of the stand-in alone, for tests to look at
    used = {name for name in vars(stand_in) if not name.startswith("_")} - own
    assert used
    assert not [name for name in used if not hasattr(getattr(api, real), name)]


def test_names_of_tensorrt() -> None:
    api = pytest.importorskip("tensorrt_rtx")
    source = inspect.getsource(trt)
    for name in (
        "ExecutionContextAllocationStrategy.USER_MANAGED", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "CudaGraphStrategy.DISABLED",
        "EngineStat.TOTAL_WEIGHTS_SIZE", "ILogger.ERROR", "Runtime.deserialize_cuda_engine", "Runtime.engine_host_code_allowed",
        "ICudaEngine.device_memory_size_v2", "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.set_runtime_cache",
        "IRuntimeConfig.cuda_graph_strategy", "IRuntimeConfig.set_execution_context_allocation_strategy",
    ):  # fmt: skip
        whole, part = name.split(".")
        assert hasattr(getattr(api, whole), part), name
        assert part in source, name


def test_tensorrt_takes_a_runtime_without_a_gpu_and_refuses_what_is_no_plan() -> None:
    api = pytest.importorskip("tensorrt_rtx")
    log = trt.error_log(api)
    assert api.Runtime(log).deserialize_cuda_engine(b"no plan at all") is None
    assert log.errors
