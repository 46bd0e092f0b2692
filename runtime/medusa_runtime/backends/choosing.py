"""Choosing the backend and the device on which a bundle runs, and opening it there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medusa_runtime.backends.base import Backend, HeadOutput, StepOutput
from medusa_runtime.backends.gpu.devices import find_gpus, parse_device
from medusa_runtime.backends.names import AUTO, BACKENDS, TRT, TRT_RTX
from medusa_runtime.backends.webgpu.adapters import choose_adapter, find_adapters, require_graphs
from medusa_runtime.bundle.cpu import Spin
from medusa_runtime.bundle.manifest import ORT_CPU, ORT_CUDA, ORT_WEBGPU, STEP, Manifest
from medusa_runtime.errors import BackendError, MissingExtraError, OptionError

KINDS = {ORT_CPU: "cpu", ORT_CUDA: "cuda", ORT_WEBGPU: "gpu"}  # of devices that a backend for ONNX bundles runs on
OF_FLAVOR = {"tensorrt": TRT, "rtx": TRT_RTX}
NO_CUDA, QUANTISED = "ONNX Runtime cannot use CUDA", "CUDA does not run quantised bundles"  # why not CUDA

__all__ = ["BACKENDS", "Backend", "HeadOutput", "Placement", "StepOutput", "choose_backend", "open_backend"]


@dataclass(frozen=True)
class Placement:
    """The backend and the device on which a bundle runs."""

    backend: str  # one of `BACKENDS`, except auto
    device: str  # "cpu", "cuda:N" or "gpu:N"
    why: str
    is_fallback: bool = False  # there is a better device here, but something for it is missing

    @property
    def processor(self) -> str | None:
        """The GPU's name. None for the CPU, and if NVIDIA's driver cannot be asked.

        Raises:
            BackendError, OptionError: WebGPU finds no such GPU.
        """
        kind, index = parse_device(self.device)
        if kind == "gpu":
            return choose_adapter(index).name
        return next((gpu.name for gpu in find_gpus().gpus if kind == "cuda" and gpu.index == index), None)

    def __str__(self) -> str:
        return f"{self.backend} on {self.device} ({self.why})"


def choose_backend(manifest: Manifest, backend: str = AUTO, device: str = AUTO) -> Placement:
    """The backend and the device that two names mean for a bundle, and why.

    Args:
        manifest: the bundle's.
        backend: one of `BACKENDS`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``gpu`` or ``gpu:N``.

    Raises:
        OptionError: one of the names is unknown, or they contradict each other.
        BackendError: that backend does not run this kind of bundle.
    """
    if backend not in BACKENDS:
        raise OptionError(f"the backend is {backend!r}; there are: {', '.join(BACKENDS)}")
    kind, index = parse_device(device)
    if manifest.engine is not None:
        return _choose_engine(OF_FLAVOR[manifest.engine.flavor], backend, kind, index)
    if backend in (TRT, TRT_RTX):
        flavor = "" if backend == TRT_RTX else " --flavor tensorrt"
        raise BackendError(f"{backend} runs engine bundles, this is an ONNX bundle; build one with: medusa-export trt{flavor}")
    if AUTO not in (backend, kind) and KINDS[backend] != kind:
        raise OptionError(f"the backend {backend} does not run on the device {device}")
    if manifest.quantization is not None and not {backend, kind}.isdisjoint({ORT_CUDA, "cuda"}):
        raise BackendError(
            f"{ORT_CUDA} does not run quantised bundles ({manifest.quantization.scheme}); use the float bundle that it was "
            "made from, or engines with rounded weights (medusa-export trt --weights)"
        )
    if backend == ORT_CPU or kind == "cpu":
        return Placement(ORT_CPU, "cpu", "asked for")
    if backend == ORT_CUDA or kind == "cuda":
        return Placement(ORT_CUDA, f"cuda:{index}", "asked for")
    if backend == ORT_WEBGPU or kind == "gpu":
        require_graphs(manifest)
        return Placement(ORT_WEBGPU, f"gpu:{index}", "asked for")
    return _choose_onnx(manifest)


def open_backend(
    bundle: str | Path,
    manifest: Manifest,
    backend: str = AUTO,
    *,
    device: str = AUTO,
    num_threads: int = 0,
    spin: Spin = "auto",
    cuda_graphs: bool | None = None,
    allow_engine_code: bool = False,
) -> Backend:
    """Open a bundle on a backend. `auto` takes the best one for the bundle on this machine, see `choose_backend`.

    Args:
        bundle: the bundle's directory.
        manifest: the bundle's.
        backend: one of `BACKENDS`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``gpu`` or ``gpu:N``.
        num_threads: for a CPU backend; 0 for one per core.
        spin: for a CPU backend, how threads wait for work within a step. "on" spins, which is fast if nothing else runs, "off"
            sleeps, which keeps most of the speed beside other programs, and "auto" spins for a moment, which is between both.
        cuda_graphs: on a GPU, whether steps are captured as CUDA graphs and replayed. None means yes with TensorRT, and no
            with ONNX Runtime, which can capture only some graphs.
        allow_engine_code: run the code that version-compatible engines bring (see `bundle.plans.require_allowed`).

    Raises:
        OptionError: a name is unknown, or they contradict each other.
        BackendError: that backend does not run this bundle, or not on this machine.
        MissingExtraError: the backend's package is not installed.
        CapacityError: the GPU has too little memory.
    """
    return open_placement(
        bundle,
        manifest,
        choose_backend(manifest, backend, device),
        num_threads=num_threads,
        spin=spin,
        cuda_graphs=cuda_graphs,
        allow_engine_code=allow_engine_code,
    )


def open_placement(
    bundle: str | Path,
    manifest: Manifest,
    placement: Placement,
    *,
    num_threads: int = 0,
    spin: Spin = "auto",
    cuda_graphs: bool | None = None,
    allow_engine_code: bool = False,
) -> Backend:
    """Open a bundle with a placement from `choose_backend`. Other arguments and errors as for `open_backend`."""
    if placement.backend == ORT_CPU:
        from medusa_runtime.backends.ort_cpu import OrtCpuBackend  # noqa: PLC0415 - needs an extra, as those below

        return OrtCpuBackend(bundle, manifest, num_threads, spin)
    if placement.backend == ORT_WEBGPU:
        from medusa_runtime.backends.webgpu.webgpu_backend import OrtWebGpuBackend  # noqa: PLC0415

        return OrtWebGpuBackend(bundle, manifest, choose_adapter(parse_device(placement.device)[1]))
    from medusa_runtime.backends.gpu.driver import Gpu  # noqa: PLC0415

    gpu = Gpu(parse_device(placement.device)[1])
    if placement.backend == ORT_CUDA:
        from medusa_runtime.backends.gpu.ort_cuda import open_ort_cuda  # noqa: PLC0415

        return open_ort_cuda(bundle, manifest, gpu, cuda_graphs=bool(cuda_graphs))
    from medusa_runtime.backends.gpu.trt import open_tensorrt  # noqa: PLC0415

    return open_tensorrt(bundle, manifest, gpu, cuda_graphs=cuda_graphs is not False, allow_engine_code=allow_engine_code)


def _choose_engine(own: str, backend: str, kind: str, index: int) -> Placement:
    """The placement of an engine bundle: the TensorRT flavour that its engines were built for, on a GPU."""
    if backend not in (AUTO, own):
        raise BackendError(f"this bundle's engines are for {own}, not {backend}; leave the backend out, or build them again")
    if kind in ("cpu", "gpu"):
        raise OptionError(f"TensorRT engines do not run on the device {kind}; the ONNX bundle that they were built from does")
    return Placement(own, f"cuda:{index}", "what its engines were built for" if backend == AUTO else "asked for")


def _choose_onnx(manifest: Manifest) -> Placement:
    """The placement of an ONNX bundle: a GPU if there is one and ONNX Runtime can use it, else the CPU."""
    if manifest.quantization is not None:
        return _webgpu_if_there(manifest, QUANTISED) or Placement(ORT_CPU, "cpu", QUANTISED)
    found = find_gpus()
    if found.why_none is not None:
        return _webgpu_if_there(manifest, NO_CUDA) or Placement(ORT_CPU, "cpu", found.why_none)
    try:
        from medusa_runtime.backends.ort_library import ort  # noqa: PLC0415 - needs an extra
    except ImportError as error:
        raise MissingExtraError("onnxruntime-gpu", "gpu") from error
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return _webgpu_if_there(manifest, NO_CUDA) or Placement(
            ORT_CPU,
            "cpu",
            f"there is {found.gpus[0].name}, but ONNX Runtime is installed without CUDA (extra gpu)",
            is_fallback=True,
        )
    return Placement(ORT_CUDA, "cuda:0", f"there is {found.gpus[0].name}")


def _webgpu_if_there(manifest: Manifest, why_not_cuda: str) -> Placement | None:
    """The placement on a GPU through WebGPU, if that is installed, finds one, and the bundle has graphs for it."""
    try:
        found = [adapter for adapter in find_adapters() if not adapter.is_software]
    except (BackendError, MissingExtraError):
        return None
    if not found or f"{STEP}.{ORT_WEBGPU}" not in manifest.graphs:
        return None
    return Placement(ORT_WEBGPU, f"gpu:{found[0].index}", f"there is {found[0].name}, and {why_not_cuda}")
