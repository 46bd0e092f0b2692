"""A stand-in for the runtime half of `tensorrt` and `tensorrt_rtx`: a plan is an ONNX graph, which ONNX Runtime executes.

It keeps TensorRT's rules: shapes within the active profile, addresses that are aligned, everything bound before a run, memory
for the activations, and a captured context left as it was bound. What is asked of it is recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort

from tests.support.stand_in_cuda import StandInDriver

VERSION = "1.7.1.116"
HEADER = b"stand-in\n"


def write_plan(path: Path, model: ir.Model, aliases: dict[str, str], profiles: list[dict[str, dict[str, list[int]]]]) -> None:
    """Save a graph where an engine would be."""
    for node in model.graph:
        node.attributes.pop("TRT_decomposable", None)  # ONNX Runtime does not know it
    facts = json.dumps({"aliases": aliases, "profiles": profiles}).encode()
    path.write_bytes(HEADER + facts + b"\n" + ir.to_proto(model).SerializeToString())


class StandInTensorRT:
    """The module.

    Args:
        driver: whose stream engines run on.
        activations: bytes that an engine asks for.
    """

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="off")
    EngineStat = SimpleNamespace(TOTAL_WEIGHTS_SIZE="weights")
    __version__ = VERSION

    class ILogger:
        ERROR = 1

        def __init__(self) -> None: ...

    def __init__(self, driver: StandInDriver, activations: int = 4096) -> None:
        self.driver, self.activations = driver, activations
        self.engines: list[Engine] = []
        self.contexts: list[Context] = []
        self.cached: list[bytes] = []  # runtime caches that were read

    def Runtime(self, log: Any) -> Any:  # noqa: N802 - TensorRT's own name
        def deserialize(plan: Any) -> Engine | None:
            data = bytes(plan[:])
            if not data.startswith(HEADER):
                log.log(1, "the plan is damaged\nsecond line")
                return None
            engine = Engine(self, log.log, *data[len(HEADER) :].split(b"\n", 1))
            self.engines.append(engine)
            return engine

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class Engine:
    def __init__(self, api: StandInTensorRT, tell: Any, facts: bytes, graph: bytes) -> None:
        self.api, self.tell = api, tell
        self.aliases: dict[str, str] = json.loads(facts)["aliases"]
        self.profiles: list[dict[str, dict[str, list[int]]]] = json.loads(facts)["profiles"]
        self.session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        proto = onnx.load_from_string(graph).graph
        self.inputs = {value.name: value for value in proto.input}
        self.outputs = {value.name: value for value in proto.output}
        self.device_memory_size_v2 = api.activations

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_shape(self, name: str) -> list[int]:
        value = (self.inputs | self.outputs)[name]
        return [size.dim_value or -1 for size in value.type.tensor_type.shape.dim]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def get_engine_stat(self, _: str) -> int:
        return 1000

    def create_runtime_config(self) -> Any:
        settings: dict[str, Any] = {}
        return SimpleNamespace(
            settings=settings,
            cuda_graph_strategy="off",
            set_execution_context_allocation_strategy=lambda value: settings.update(strategy=value),
            set_runtime_cache=lambda value: not settings.update(cache=value),
            create_runtime_cache=lambda: RuntimeCache(self.api),
        )

    def create_execution_context(self, how: Any) -> Context:
        context = Context(self, how)
        self.api.contexts.append(context)
        return context


class RuntimeCache:
    def __init__(self, api: StandInTensorRT) -> None:
        self._api = api

    def serialize(self) -> bytes:
        return b"compiled"

    def deserialize(self, data: bytes) -> bool:
        self._api.cached.append(data)
        return data == b"compiled"


class Context:
    def __init__(self, engine: Engine, how: Any) -> None:
        self.engine, self.how = engine, how
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.is_captured = False
        self.num_runs = 0
        self.num_bindings = 0

    @property
    def graph_strategy(self) -> str | None:
        """Of TensorRT-RTX: whether it captures by itself."""
        return getattr(self.how, "cuda_graph_strategy", None)

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.engine.api.driver.room(address, size, on_device=True)
        self.scratch = (address, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == 77
        self.profile = index
        return index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.is_captured, "the context of a captured graph gets another shape"
        assert self.profile is not None, "a shape is set before the profile"
        bounds = self.engine.profiles[self.profile].get(name)
        fixed = self.engine.get_tensor_shape(name)
        if bounds and not all(low <= size <= high for low, size, high in zip(bounds["min"], shape, bounds["max"], strict=True)):
            self.engine.tell(1, f"{name} is out of bounds")
            return False
        self.shapes[name] = tuple(shape)
        return all(want in (-1, size) for want, size in zip(fixed, shape, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert not self.is_captured, "the context of a captured graph gets another address"
        self.num_bindings += 1
        self.addresses[name] = address
        return address % 256 == 0 and (name in self.engine.inputs or name in self.engine.outputs)

    def execute_async_v3(self, stream: int) -> bool:
        engine, driver = self.engine, self.engine.api.driver
        assert stream == 77
        assert self.scratch is not None, "there is no memory for activations"
        if missing := [name for name in (*engine.inputs, *engine.outputs) if name not in self.addresses]:
            engine.tell(1, f"{missing[0]} is not bound")
            return False
        for output, source in engine.aliases.items():
            assert self.addresses[output] == self.addresses[source], f"{output} does not share the memory of {source}"
        self.num_runs += 1
        if driver.capturing is not None:
            self.is_captured = True
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        driver.add(lambda: self._execute(addresses, shapes))
        return True

    def _execute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        engine, binding = self.engine, self.engine.session.io_binding()
        sizes = {
            dim.dim_param: size
            for name, value in engine.inputs.items()
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes[name], strict=True)
            if dim.dim_param
        }
        for values, bind in ((engine.inputs, binding.bind_input), (engine.outputs, binding.bind_output)):
            for name, value in values.items():
                tensor = value.type.tensor_type
                shape = tuple(sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in tensor.shape.dim)
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
                size = int(dtype.itemsize)
                for length in shape:
                    size *= length
                engine.api.driver.room(addresses[name], size, on_device=True)
                bind(name, "cpu", 0, tensor.elem_type, shape, addresses[name])
        engine.session.run_with_iobinding(binding)
