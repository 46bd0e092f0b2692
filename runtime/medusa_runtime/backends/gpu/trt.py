"""TensorRT and TensorRT-RTX: engines on a GPU, by the small part of their API that decoding needs."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_runtime.backends.gpu.backend import GpuBackend
from medusa_runtime.backends.gpu.buffers import Tensor
from medusa_runtime.backends.gpu.driver import DeviceMemory, Gpu
from medusa_runtime.backends.gpu.step import Call, Shape
from medusa_runtime.bundle.files import replacing
from medusa_runtime.bundle.manifest import HEADS, RUNTIME_CACHE, STEP, Manifest
from medusa_runtime.bundle.plans import FLAVOR_NAMES, open_plan, plan_size, require_allowed, require_loadable
from medusa_runtime.ending import native_run
from medusa_runtime.errors import BackendError, MissingExtraError, first_line

PACKAGES = {"rtx": ("tensorrt_rtx", "rtx"), "tensorrt": ("tensorrt", "trt")}  # by flavour: module and extra
log = logging.getLogger(__name__)


def open_tensorrt(
    bundle: str | Path, manifest: Manifest, gpu: Gpu, *, cuda_graphs: bool = True, allow_engine_code: bool = False
) -> GpuBackend:
    """Open an engine bundle on a GPU.

    Args:
        bundle: the engine bundle's directory.
        manifest: the bundle's.
        gpu: the GPU to run on.
        cuda_graphs: replay a step as one CUDA graph. TensorRT-RTX captures by itself, because its kernels may change while it
            runs.
        allow_engine_code: run the code that plans with a lean runtime contain.

    Raises:
        MissingExtraError: the flavour's package is not installed.
        BundleError, BackendError: the engines are of another version, flavour or GPU, or damaged.
        CapacityError: the GPU has too little memory.
    """
    assert manifest.engine is not None
    package, extra = PACKAGES[manifest.engine.flavor]
    try:
        api = importlib.import_module(package)
    except OSError as error:
        raise BackendError(f"{package} is installed, but libraries that it needs are missing ({first_line(error)})") from error
    except ImportError as error:
        raise MissingExtraError(package, extra) from error
    require_loadable(
        manifest,
        bundle,
        flavor=manifest.engine.flavor,
        tensorrt_version=str(api.__version__),
        compute_capability=gpu.facts.compute_capability,
    )
    require_allowed(manifest, bundle, allow_engine_code=allow_engine_code)
    gpu.make_current()
    executor = TensorRTExecutor(api, Path(bundle), manifest, gpu, cuda_graphs=cuda_graphs)
    return GpuBackend(manifest, gpu, executor, cuda_graphs=cuda_graphs)


@dataclass
class _Bound:
    """An execution context, and the tensors it is bound to."""

    context: Any
    call: Call | None = None  # the call that the tensors belong to, once all of them are bound
    tensors: dict[str, Tensor] = field(default_factory=dict)


class TensorRTExecutor:
    """Runs the step's and the heads' engine.

    All contexts share one memory for activations, because they run one after another on one stream. A CUDA graph keeps the
    addresses that its context was bound to, so each captured shape has a context of its own.

    Args:
        api: the module `tensorrt` or `tensorrt_rtx`.
        bundle: the engine bundle's directory.
        manifest: the bundle's.
        gpu: the GPU to run on.
        cuda_graphs: see `open_tensorrt`.
    """

    def __init__(self, api: Any, bundle: Path, manifest: Manifest, gpu: Gpu, *, cuda_graphs: bool) -> None:
        assert manifest.engine is not None
        # In the order in which they must be freed: contexts before the engines that they were made of.
        self._contexts: dict[tuple[str, str, Shape | None], _Bound] = {}  # by graph, profile and, if it is captured, shape
        self._runtime_cache: Any = None
        self._configs: list[Any] = []
        self._engines: dict[str, Any] = {}
        self._api, self._gpu, self._manifest = api, gpu, manifest
        self._is_rtx = manifest.engine.flavor == "rtx"
        self._name = FLAVOR_NAMES[manifest.engine.flavor]
        self._cuda_graphs = cuda_graphs
        self.can_be_captured = not self._is_rtx
        self._log = error_log(api)
        self._runtime = api.Runtime(self._log)
        if manifest.engine.lean_runtime:
            self._runtime.engine_host_code_allowed = True  # `require_allowed` has asked the caller
        for graph in (STEP, HEADS):
            self._engines[graph] = self._engine(bundle, graph)
        self._cache_file = bundle / RUNTIME_CACHE.format(gpu.facts.compute_capability.replace(".", ""))
        if self._is_rtx:
            self._runtime_cache = self._load_runtime_cache()
        self._scratch: DeviceMemory | None = self._allocate_scratch()

    def run(self, call: Call) -> None:
        """See `Executor.run`."""
        self._log.errors.clear()
        captured = self._cuda_graphs and self.can_be_captured
        key = (call.graph, call.profile, call.key if captured else None)
        if key not in self._contexts:
            self._contexts[key] = _Bound(self._context(call))
        bound = self._contexts[key]
        if bound.call is not call:
            self._bind(bound, call)
        with native_run():
            is_queued = bound.context.execute_async_v3(self._gpu.stream)
        if not is_queued:
            raise self._failure(f"cannot run the {call.graph} engine")

    def forget(self, key: Shape | None = None) -> None:
        """See `Executor.forget`. Contexts without a shape of their own stay: every run binds them anew."""
        for place in [place for place in self._contexts if place[2] is not None and key in (None, place[2])]:
            del self._contexts[place]

    def memory(self) -> dict[str, int]:
        """See `Executor.memory`."""
        stat = self._api.EngineStat.TOTAL_WEIGHTS_SIZE
        weights = sum(int(engine.get_engine_stat(stat)) for engine in self._engines.values())
        return {"weights": weights, "activations": self._scratch.num_bytes if self._scratch else 0}

    def close(self) -> None:
        """See `Executor.close`."""
        self._contexts.clear()
        self._scratch = self._runtime_cache = None
        self._configs.clear()
        self._engines.clear()
        self._runtime = None

    def save(self) -> None:
        """See `Executor.save`. Keeps the kernels that TensorRT-RTX compiled for this GPU: the next start is much faster."""
        if self._runtime_cache is None:
            return
        compiled = self._runtime_cache.serialize()
        if compiled is None:
            log.warning("%s does not give out what it compiled: the next start compiles again", self._name)
            return
        try:
            with replacing(self._cache_file) as temporary:
                temporary.write_bytes(bytes(compiled))
        except OSError as error:
            log.warning("%s cannot be written (%s): the next start compiles again", self._cache_file, error.strerror or error)

    def _engine(self, bundle: Path, graph: str) -> Any:
        path = bundle / self._manifest.graphs[graph].file
        with open_plan(self._manifest, bundle, graph) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            needed = plan_size(self._manifest, graph)
            if needed > self._gpu.free_memory():
                raise self._gpu.shortage(f"{path.name} of {bundle}", needed)
            raise self._failure(f"cannot load {path}")
        self._log.errors.clear()
        self._require_contract(engine, graph, path)
        return engine

    def _require_contract(self, engine: Any, graph: str, path: Path) -> None:
        """Refuse an engine that differs from the manifest, or that would not update the cache in place."""
        facts, aliases = self._manifest.graphs[graph], self._manifest.engine.aliases if self._manifest.engine else {}
        found = {
            name: [int(size) for size in engine.get_tensor_shape(name)]
            for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
        }
        wanted = {
            tensor.name: [size if isinstance(size, int) else -1 for size in tensor.shape]
            for tensor in (*facts.inputs, *facts.outputs)
        }
        for name in sorted({*found, *wanted}):
            if found.get(name) != wanted.get(name):
                have, want = found.get(name, "missing"), wanted.get(name, "missing")
                raise BackendError(f"{path} has the tensor {name} as {have}, the manifest says {want}; build the engine again")
        for tensor in facts.outputs:
            shared, expected = engine.get_aliased_input_tensor(tensor.name) or None, aliases.get(tensor.name)
            if shared != expected:
                raise BackendError(
                    f"{path} writes {tensor.name} into {shared or 'memory of its own'}, "
                    f"the manifest says {expected or 'memory of its own'}; build the engine again"
                )

    def _allocate_scratch(self) -> DeviceMemory:
        size = max(int(engine.device_memory_size_v2) for engine in self._engines.values())
        return self._gpu.allocate(size, "the memory for the engine's activations")

    def _bind(self, bound: _Bound, call: Call) -> None:
        """Bind a context to a call's tensors, except those it is bound to already."""
        inputs = {tensor.name for tensor in self._manifest.graphs[call.graph].inputs}
        bound.call = None
        for name, tensor in call.tensors.items():
            if bound.tensors.get(name) == tensor:
                continue
            if name in inputs and not bound.context.set_input_shape(name, tensor.shape):
                raise self._failure(f"does not take {name} of shape {list(tensor.shape)} in the profile {call.profile}")
            if not bound.context.set_tensor_address(name, tensor.address):
                raise self._failure(f"does not take an address for {name}")
            bound.tensors[name] = tensor
        bound.call = call

    def _context(self, call: Call) -> Any:
        engine, strategy = self._engines[call.graph], self._api.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._is_rtx:
            config = self._config(engine)
            config.set_execution_context_allocation_strategy(strategy)
            graphs = self._api.CudaGraphStrategy
            config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if self._captures(call) else graphs.DISABLED
            if not config.set_runtime_cache(self._runtime_cache):
                raise self._failure("does not take its runtime cache")
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            raise self._failure(f"cannot make a context of the {call.graph} engine")
        assert self._scratch is not None
        context.set_device_memory(self._scratch.address, self._scratch.num_bytes)
        assert self._manifest.engine is not None
        profiles = [name for name in self._manifest.engine.profiles if (name == HEADS) == (call.graph == HEADS)]
        if not context.set_optimization_profile_async(profiles.index(call.profile), self._gpu.stream):
            raise self._failure(f"cannot set the profile {call.profile}")
        return context

    def _config(self, engine: Any) -> Any:
        """A runtime configuration. It is kept as long as contexts made with it may need it."""
        config = engine.create_runtime_config()
        self._configs.append(config)
        return config

    def _captures(self, call: Call) -> bool:
        """Whether TensorRT-RTX should capture. Shapes of prompts come again too rarely to be worth it."""
        return self._cuda_graphs and (call.graph == HEADS or call.key is not None)

    def _load_runtime_cache(self) -> Any:
        cache = self._config(self._engines[STEP]).create_runtime_cache()
        try:
            compiled = self._cache_file.read_bytes()
        except FileNotFoundError:
            return cache
        except OSError as error:
            log.warning("%s cannot be read (%s): the engine is compiled again", self._cache_file, error.strerror or error)
            return cache
        if not cache.deserialize(compiled):
            log.warning("%s is of another version or GPU: the engine is compiled again", self._cache_file)
        return cache

    def _failure(self, what: str) -> BackendError:
        reason = next((message for message in self._log.errors if message.strip()), "it gave no reason")
        self._log.errors.clear()
        return BackendError(f"{self._name} {what}: {reason.strip().splitlines()[0]}")


def error_log(api: Any, tell: Callable[[str], None] | None = None) -> Any:
    """A logger for TensorRT that keeps errors in order: the first one is the cause.

    Args:
        api: the module `tensorrt` or `tensorrt_rtx`.
        tell: called with each line that is logged.
    """

    class ErrorLog(api.ILogger):  # type: ignore[misc]  # a class of a module that is known only now
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= api.ILogger.ERROR:
                self.errors.append(message)
            if tell is not None:
                tell(f"{severity.name.lower()}: {message}")

    return ErrorLog()
