"""ONNX Runtime on a GPU: the portable graphs through its CUDA provider, on our stream and our memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from medusa_runtime.backends.forks import kept_in_children
from medusa_runtime.backends.gpu.backend import GpuBackend
from medusa_runtime.backends.gpu.devices import preload_libraries
from medusa_runtime.backends.gpu.driver import Gpu
from medusa_runtime.backends.gpu.step import Call, Shape
from medusa_runtime.bundle.manifest import HEADS, ORT_CUDA, STEP, Manifest
from medusa_runtime.ending import native_run
from medusa_runtime.errors import BackendError, MissingExtraError, first_line

try:
    from medusa_runtime.backends.ort_library import ort
except ImportError as error:
    raise MissingExtraError("onnxruntime-gpu", "gpu") from error

PROVIDER = "CUDAExecutionProvider"
ELEMENT_TYPES = {"float": 1, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}  # TensorProto.DataType
NO_CAPTURE = "-1"


def open_ort_cuda(bundle: str | Path, manifest: Manifest, gpu: Gpu, *, cuda_graphs: bool = False) -> GpuBackend:
    """Open an ONNX bundle on a GPU.

    Args:
        bundle: the bundle's directory.
        manifest: the bundle's.
        gpu: the GPU to run on.
        cuda_graphs: have ONNX Runtime capture verification steps. It refuses graphs if it keeps some of their nodes on the CPU.

    Raises:
        BackendError: this ONNX Runtime has no CUDA provider, or it cannot open a graph with it.
        CapacityError: the GPU has too little memory.
    """
    if PROVIDER not in ort.get_available_providers():
        raise BackendError(
            "the installed ONNX Runtime is for the CPU alone; replace it with: "
            "pip uninstall onnxruntime && pip install 'medusa-export[gpu]'"
        )
    preload_libraries(ort)
    gpu.make_current()
    return GpuBackend(manifest, gpu, OrtCudaExecutor(Path(bundle), manifest, gpu, cuda_graphs=cuda_graphs))


class OrtCudaExecutor:
    """Runs the step's and the heads' graph.

    Args:
        bundle: the bundle's directory.
        manifest: the bundle's.
        gpu: the GPU to run on; sessions queue their work on its stream.
        cuda_graphs: see `open_ort_cuda`.
    """

    can_be_captured = False  # ONNX Runtime allocates while it runs; it captures in a way of its own

    def __init__(self, bundle: Path, manifest: Manifest, gpu: Gpu, *, cuda_graphs: bool = False) -> None:
        self._gpu = gpu
        self._cuda_graphs = cuda_graphs
        self._facts = {name: manifest.graph(name, ORT_CUDA) for name in (STEP, HEADS)}
        self._sessions = {name: self._open(bundle / facts.file) for name, facts in self._facts.items()}
        self._inputs = {name: {tensor.name for tensor in facts.inputs} for name, facts in self._facts.items()}
        self._types = {
            name: {tensor.name: ELEMENT_TYPES[tensor.dtype] for tensor in (*facts.inputs, *facts.outputs)}
            for name, facts in self._facts.items()
        }
        self._bindings: dict[tuple[str, Shape | None], ort.IOBinding] = {}
        self._graph_ids: dict[tuple[str, Shape | None], str] = {}
        self._numbers = itertools.count(1)

    def run(self, call: Call) -> None:
        """See `Executor.run`."""
        try:
            with native_run():
                self._sessions[call.graph].run_with_iobinding(self._binding(call), self._run_options(call))
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            raise BackendError(f"ONNX Runtime cannot run the {call.graph} graph: {first_line(error)}") from error

    def forget(self, key: Shape | None = None) -> None:
        """See `Executor.forget`."""
        for kept in (self._bindings, self._graph_ids):
            for place in [place for place in kept if key is None or place[1] == key]:
                del kept[place]

    def memory(self) -> dict[str, int]:
        """See `Executor.memory`: ONNX Runtime does not say."""
        return {}

    def save(self) -> None:
        """See `Executor.save`: there is nothing to keep."""

    def close(self) -> None:
        """See `Executor.close`."""
        self.forget()
        self._sessions.clear()

    def _binding(self, call: Call) -> ort.IOBinding:
        place = (call.graph, call.key)
        if call.key is not None and place in self._bindings:
            return self._bindings[place]
        binding = self._sessions[call.graph].io_binding()
        inputs, types, device = self._inputs[call.graph], self._types[call.graph], ("cuda", self._gpu.facts.index)
        for name, tensor in call.tensors.items():
            bind = binding.bind_input if name in inputs else binding.bind_output
            bind(name, *device, types[name], tensor.shape, tensor.address)
        if call.key is not None:
            self._bindings[place] = binding
        return binding

    def _run_options(self, call: Call) -> ort.RunOptions:
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the backend waits, once
        if self._cuda_graphs:
            place = (call.graph, call.key)
            if call.key is not None and place not in self._graph_ids:
                self._graph_ids[place] = str(next(self._numbers))
            options.add_run_config_entry("gpu_graph_id", self._graph_ids.get(place, NO_CAPTURE))
        return options

    def _open(self, path: Path) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 2  # warnings stay on: ONNX Runtime warns if it copies the cache
        settings: dict[str, Any] = {
            "device_id": str(self._gpu.facts.index),
            "user_compute_stream": str(self._gpu.stream),
            "use_tf32": "0",  # products in fp32 keep all bits of fp32
            "enable_cuda_graph": str(int(self._cuda_graphs)),
        }
        try:
            providers = [(PROVIDER, settings), "CPUExecutionProvider"]
            session = kept_in_children(ort.InferenceSession(path, options, providers=providers))
        except Exception as error:  # as for running
            raise BackendError(f"ONNX Runtime cannot open {path} on {self._gpu.facts.name}: {first_line(error)}") from error
        if PROVIDER not in session.get_providers():  # it has logged why, and gone on without it
            raise BackendError(
                f"ONNX Runtime cannot use {self._gpu.facts.name}: its CUDA provider does not load; "
                "install CUDA and cuDNN in the versions that this ONNX Runtime was made for"
            )
        return session
